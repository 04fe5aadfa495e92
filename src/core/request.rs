//! What a pod asks for itself: annotations, and the same keys in `args.cni`.

use ipnet::IpNet;
use serde_json::{Map, Value};

use crate::{
    cidr,
    error::{Error, quoted},
    finding::{Finding, Id},
    netconf::{RawConf, Strictness, args_cni, did_you_mean},
    numbers::ANNOTATION_LIMIT,
    select::Selection,
};

/// Key in `runtimeConfig` under which containerd (1.5.0 on) and CRI-O (1.29.0 on) hand over all pod annotations.
pub const ANNOTATIONS_CAPABILITY: &str = "io.kubernetes.cri.pod-annotations";
/// Prefix of our annotations.
pub const PREFIX: &str = "crosslink.dev/";

const HIJACK: &str = "hijack";
const HIJACK_CIDR: &str = "hijack-cidr";
const EXCLUDE_CIDR: &str = "exclude-cidr";
const KEYS: [&str; 3] = [HIJACK, HIJACK_CIDR, EXCLUDE_CIDR];

/// A CIDR and how to name the place where it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedCidr {
    /// The CIDR.
    pub net: IpNet,
    /// E.g. `annotation crosslink.dev/hijack-cidr`.
    pub place: String,
}

/// A pod's own wishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodRequest {
    /// Replaces the conflist's `hijack`.
    pub hijack: Option<Selection>,
    /// More CIDRs.
    pub hijack_cidr: Vec<NamedCidr>,
    /// Added to the conflist's `excludeCIDR`.
    pub exclude_cidr: Vec<IpNet>,
}

/// One key's value and the place it came from.
struct Setting {
    key: &'static str,
    place: String,
    value: Value,
}

/// Reads the pod's wishes. An annotation wins over `args.cni`, key by key.
///
/// # Errors
/// Code 7, naming the annotation, the value and the cure.
pub fn parse(raw: &RawConf<'_>, strictness: Strictness) -> Result<(PodRequest, Vec<Finding>), Error> {
    let mut findings = Vec::new();
    let mut settings: Vec<Setting> = Vec::new();
    for (name, value) in annotations(raw)? {
        let Some(name) = name.strip_prefix(PREFIX) else { continue };
        match known(name) {
            Some(key) => settings.push(Setting { key, place: format!("annotation {PREFIX}{key}"), value }),
            None => unknown("annotation", PREFIX, name, strictness, &mut findings)?,
        }
    }
    for (name, value) in args_cni(raw)? {
        match known(&name) {
            Some(key) if settings.iter().any(|setting| setting.key == key) => {}
            Some(key) => settings.push(Setting { key, place: format!("args.cni key {key}"), value }),
            // `args.cni` belongs to every plugin of the chain, so only a near miss can be meant for us.
            None if did_you_mean(&name, &KEYS).is_some() => {
                unknown("args.cni key", "", &name, strictness, &mut findings)?;
            }
            None => {}
        }
    }
    let mut request = PodRequest::default();
    for setting in &settings {
        match setting.apply(&mut request) {
            Err(err) if strictness == Strictness::Lenient => findings.push(Finding::new(Id::UnknownKey, err.msg)),
            other => other?,
        }
    }
    Ok((request, findings))
}

fn known(name: &str) -> Option<&'static str> {
    KEYS.into_iter().find(|key| *key == name)
}

fn unknown(
    what: &str,
    prefix: &str,
    name: &str,
    strictness: Strictness,
    findings: &mut Vec<Finding>,
) -> Result<(), Error> {
    let near = did_you_mean(name, &KEYS);
    let shown = quoted(&format!("{prefix}{name}"));
    match (near, strictness) {
        (Some(near), Strictness::Full | Strictness::Near) => {
            Err(Error::config(format!("unknown {what} {shown}: did you mean \"{prefix}{near}\"?")))
        }
        (None, Strictness::Full) => Err(Error::config(format!("unknown {what} {shown}: remove it"))),
        _ => {
            findings.push(Finding::new(Id::UnknownKey, format!("unknown {what} {shown}: ignored")));
            Ok(())
        }
    }
}

/// The runtime's annotations. containerd writes `null` for a pod without any, CRI-O `{}`, older runtimes no key.
fn annotations(raw: &RawConf<'_>) -> Result<Map<String, Value>, Error> {
    let shape = |what: &str, value: &Value| {
        Error::config(format!("{what} is {}: the runtime must give an object", quoted(&value.to_string())))
    };
    let mut config = match raw.value("runtimeConfig")? {
        None => return Ok(Map::new()),
        Some(Value::Object(config)) => config,
        Some(other) => return Err(shape("runtimeConfig", &other)),
    };
    match config.remove(ANNOTATIONS_CAPABILITY) {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(annotations)) => Ok(annotations),
        Some(other) => Err(shape(&format!("runtimeConfig \"{ANNOTATIONS_CAPABILITY}\""), &other)),
    }
}

impl Setting {
    fn apply(&self, request: &mut PodRequest) -> Result<(), Error> {
        match self.key {
            HIJACK => {
                let items = self.items()?;
                if items.is_empty() {
                    return Err(self.bad("give all, none, or cluster names separated by commas"));
                }
                let names = items.iter().map(String::as_str);
                request.hijack = Some(Selection::parse(names).map_err(|cure| self.bad(&cure))?);
            }
            HIJACK_CIDR => {
                let place = self.place.clone();
                request.hijack_cidr =
                    self.cidrs()?.into_iter().map(|net| NamedCidr { net, place: place.clone() }).collect();
            }
            _ => request.exclude_cidr = self.cidrs()?,
        }
        Ok(())
    }

    fn bad(&self, cure: &str) -> Error {
        let value = match &self.value {
            Value::String(text) => quoted(text),
            other => quoted(&other.to_string()),
        };
        Error::config(format!("{} has the value {value}: {cure}", self.place))
    }

    /// The comma-separated items; nothing for an empty text. `args.cni` may also hold a list.
    fn items(&self) -> Result<Vec<String>, Error> {
        match &self.value {
            Value::String(text) if text.trim().is_empty() => Ok(Vec::new()),
            Value::String(text) => Ok(text.split(',').map(|item| item.trim().to_owned()).collect()),
            Value::Array(items) if !self.place.starts_with("annotation") => items
                .iter()
                .map(|item| item.as_str().map(|text| text.trim().to_owned()))
                .collect::<Option<_>>()
                .ok_or_else(|| self.bad("give strings")),
            _ => Err(self.bad("give a string")),
        }
    }

    fn cidrs(&self) -> Result<Vec<IpNet>, Error> {
        let items = self.items()?;
        if items.len() > ANNOTATION_LIMIT {
            let count = items.len();
            return Err(self.bad(&format!("{count} CIDRs are more than the {ANNOTATION_LIMIT} that it may list")));
        }
        items.iter().map(|item| cidr::parse(item).map_err(|err| self.bad(&err.to_string()))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn request(config: &Value) -> Result<(PodRequest, Vec<Finding>), Error> {
        let text = config.to_string();
        parse(&RawConf::parse(&text)?, Strictness::Near)
    }

    fn annotated(annotations: Value) -> Value {
        json!({"name": "n", "runtimeConfig": {ANNOTATIONS_CAPABILITY: annotations}})
    }

    #[test]
    fn null_empty_and_missing_mean_none() {
        for config in [
            json!({}),
            json!({"runtimeConfig": null}),
            json!({"runtimeConfig": {}}),
            annotated(json!(null)),
            annotated(json!({})),
            json!({"args": null}),
            json!({"args": {}}),
            json!({"args": {"cni": null}}),
        ] {
            assert_eq!(request(&config).unwrap().0, PodRequest::default(), "{config}");
        }
    }

    #[test]
    fn white_space_host_bits_and_case_are_normalised() {
        let value = " 10.1.2.3/8 , FD00::1/64,\t192.0.2.7 ";
        let (request, _) = request(&annotated(json!({"crosslink.dev/hijack-cidr": value}))).unwrap();
        let nets: Vec<String> = request.hijack_cidr.iter().map(|named| named.net.to_string()).collect();
        assert_eq!(nets, ["10.0.0.0/8", "fd00::/64", "192.0.2.7/32"]);
    }

    #[test]
    fn an_annotation_wins_over_args_key_by_key() {
        let mut config = annotated(json!({"crosslink.dev/hijack": "cluster-b"}));
        config["args"] = json!({"cni": {"hijack": "none", "exclude-cidr": "10.0.0.1", "ips": ["1.2.3.4"]}});
        let (request, findings) = request(&config).unwrap();
        assert!(request.hijack.unwrap().includes("cluster-b"));
        assert_eq!(request.exclude_cidr.len(), 1);
        assert!(findings.is_empty());
    }

    #[test]
    fn bad_values_name_annotation_value_and_cure() {
        for (key, value) in [
            ("crosslink.dev/hijack", json!("")),
            ("crosslink.dev/hijack", json!("all,cluster-b")),
            ("crosslink.dev/hijack", json!(true)),
            ("crosslink.dev/hijack-cidr", json!("10.0.0.0/33")),
            ("crosslink.dev/hijack-cidr", json!("10.0.0.0/8,,10.1.0.0/16")),
            ("crosslink.dev/exclude-cidr", json!(["10.0.0.0/8"])),
            ("crosslink.dev/hijack-cidr", json!(vec!["10.0.0.1"; 257].join(","))),
        ] {
            let err = request(&annotated(json!({key: value}))).unwrap_err();
            assert_eq!(err.code, crate::error::Code::Config);
            assert!(err.msg.contains(key), "{}", err.msg);
        }
    }

    #[test]
    fn unknown_annotations_of_ours() {
        let err = request(&annotated(json!({"crosslink.dev/hijack-cidrs": "10.0.0.0/8"}))).unwrap_err();
        assert!(err.msg.contains("did you mean \"crosslink.dev/hijack-cidr\""), "{}", err.msg);
        let (_, findings) = request(&annotated(json!({"crosslink.dev/something-new": "x", "a/b": 7}))).unwrap();
        assert_eq!(findings.len(), 1);
    }

    #[test]
    fn annotations_of_a_wrong_shape() {
        for shape in [json!([]), json!("x"), json!(3)] {
            assert!(request(&annotated(shape)).is_err());
        }
    }
}
