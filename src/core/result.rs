//! The result of the plugins before us: passed on byte for byte, looked at only where we must.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};

use crate::{
    error::{Code, Error, quoted},
    json::Object,
    netconf::RawConf,
};

/// One entry of `ips` that belongs to the attachment's interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResultIp {
    /// The address, without its prefix length.
    pub addr: IpAddr,
    /// Gateway.
    pub gateway: Option<IpAddr>,
}

/// What is read of a result; every other field, known or not, is skipped.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct View<'a> {
    #[serde(default)]
    cni_version: Option<String>,
    #[serde(default, borrow)]
    interfaces: Option<&'a RawValue>,
    #[serde(default, borrow)]
    ips: Option<&'a RawValue>,
}

/// One of the lists of a result; missing and `null` are the same.
fn list<T: DeserializeOwned>(key: &str, raw: Option<&RawValue>) -> Result<Vec<Object<T>>, Error> {
    let Some(raw) = raw else { return Ok(Vec::new()) };
    let parsed: Result<Option<Vec<Object<T>>>, _> = serde_json::from_str(raw.get());
    parsed
        .map(Option::unwrap_or_default)
        .map_err(|err| Error::new(Code::Decode, format!("prevResult is not a CNI result: key \"{key}\": {err}")))
}

#[derive(Deserialize)]
struct Interface {
    name: Option<String>,
    sandbox: Option<String>,
}

#[derive(Deserialize)]
struct Ip {
    interface: Option<i64>,
    address: Option<String>,
    gateway: Option<String>,
}

/// A view of prevResult, of any version from 0.3.0 to 1.1.0.
#[derive(Clone, Debug)]
pub struct PrevResult<'a> {
    raw: &'a RawValue,
    versioned: bool,
    /// Addresses that the result gives to the attachment's interface.
    pub ips: Vec<ResultIp>,
}

impl<'a> PrevResult<'a> {
    /// Reads what concerns interface `ifname`; everything else stays as it is.
    ///
    /// # Errors
    /// Code 7 where there is none, code 6 where it is not a result.
    pub fn parse(conf: &RawConf<'a>, ifname: &str) -> Result<Self, Error> {
        let raw = conf.raw("prevResult").filter(|raw| raw.get() != "null").ok_or_else(|| {
            Error::config(
                "prevResult is missing: crosslink is a chained plugin, put it after a main CNI plugin in a conflist",
            )
        })?;
        let Object(view): Object<View<'_>> = serde_json::from_str(raw.get())
            .map_err(|err| Error::new(Code::Decode, format!("prevResult is not a CNI result: {err}")))?;
        let interfaces = list::<Interface>("interfaces", view.interfaces)?;
        let mut ips = Vec::new();
        for Object(ip) in list("ips", view.ips)?.iter().filter(|ip| belongs(&ip.0, &interfaces, ifname)) {
            ips.extend(result_ip(ip)?);
        }
        Ok(Self { raw, versioned: view.cni_version.is_some_and(|version| !version.is_empty()), ips })
    }

    /// The result to print: prevResult unchanged, with `cniVersion` put in where the runtime left it out.
    pub fn output(&self, cni_version: &str) -> String {
        let text = self.raw.get();
        if self.versioned {
            return text.to_owned();
        }
        let mut fields: BTreeMap<String, &RawValue> = serde_json::from_str(text).unwrap_or_default();
        fields.remove("cniVersion");
        let mut output = format!("{{\"cniVersion\":{}", Value::from(cni_version));
        for (key, value) in fields {
            output.push_str(&format!(",{}:{value}", Value::from(key)));
        }
        output.push('}');
        output
    }
}

/// Whether an `ips` entry is of the interface: by index into `interfaces`; without one it is `CNI_IFNAME`'s.
fn belongs(ip: &Ip, interfaces: &[Object<Interface>], ifname: &str) -> bool {
    let Some(index) = ip.interface else { return true };
    let interface = usize::try_from(index).ok().and_then(|index| interfaces.get(index));
    interface.is_none_or(|Object(interface)| {
        let sandboxed = interface.sandbox.as_ref().is_some_and(|path| !path.is_empty());
        interface.name.as_deref() == Some(ifname) && sandboxed
    })
}

fn result_ip(ip: &Ip) -> Result<Option<ResultIp>, Error> {
    let Some(text) = &ip.address else { return Ok(None) };
    let (addr, length) = text.split_once('/').unwrap_or((text, ""));
    let addr: Option<IpAddr> = addr.parse().ok();
    let Some(addr) = addr.filter(|_| length.is_empty() || length.parse::<u8>().is_ok_and(|length| length <= 128))
    else {
        return Err(Error::new(Code::Decode, format!("prevResult: ips address {} is not a CIDR", quoted(text))));
    };
    // Some plugins write "0.0.0.0", "::" or "" for none.
    let gateway = ip.gateway.as_ref().and_then(|text| text.parse().ok());
    Ok(Some(ResultIp { addr, gateway: gateway.filter(|gateway: &IpAddr| !gateway.is_unspecified()) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(prev: &str) -> Result<(Vec<ResultIp>, String), Error> {
        let conf = format!(r#"{{"name":"n","prevResult":{prev}}}"#);
        let raw = RawConf::parse(&conf)?;
        let prev = PrevResult::parse(&raw, "eth0")?;
        Ok((prev.ips.clone(), prev.output("1.0.0")))
    }

    #[test]
    fn the_text_is_kept_to_the_byte() {
        for text in [
            r#"{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.1.0.5/16","gateway":"10.1.0.1"}],"dns":{}}"#,
            r#"{ "x":1.50, "cniVersion":"1.1.0", "interfaces":[{"name":"eth0","mtu":1500,"socketPath":"/x","future":[1e400]}] }"#,
            r#"{"cniVersion":"1.1.0","routes":[{"dst":"10.0.0.0/8","mtu":1400,"advmss":1360,"priority":5,"table":100,"scope":253}]}"#,
            r#"{"cniVersion":"1.0.0","interfaces":[{"name":"ib0","mac":"80:00:02:08:fe:80:00:00:00:00:00:00:e4:1d:2d:03:00:a5:f1:e1","sandbox":"/x"}]}"#,
        ] {
            assert_eq!(parse(text).unwrap().1, text);
        }
    }

    #[test]
    fn the_version_is_put_in_where_it_is_missing() {
        assert_eq!(parse("{}").unwrap().1, r#"{"cniVersion":"1.0.0"}"#);
        assert_eq!(parse(r#"{"dns":{}}"#).unwrap().1, r#"{"cniVersion":"1.0.0","dns":{}}"#);
    }

    #[test]
    fn only_our_interfaces_addresses_count() {
        let (ips, _) = parse(
            r#"{"cniVersion":"1.0.0","interfaces":[{"name":"cni0"},{"name":"eth0","sandbox":"/n"},{"name":"net1","sandbox":"/n"}],
            "ips":[{"interface":1,"address":"10.1.0.5/16","gateway":"10.1.0.1"},{"interface":2,"address":"10.2.0.5/16"},
            {"address":"fd00::5/64","gateway":"::"},{"interface":0,"address":"10.3.0.1/16"}]}"#,
        )
        .unwrap();
        let texts: Vec<String> = ips.iter().map(|ip| ip.addr.to_string()).collect();
        assert_eq!(texts, ["10.1.0.5", "fd00::5"]);
        assert_eq!(ips[0].gateway, Some("10.1.0.1".parse().unwrap()));
        assert_eq!(ips[1].gateway, None);
    }

    #[test]
    fn missing_and_malformed_results_are_clean_errors() {
        let raw = RawConf::parse(r#"{"name":"n"}"#).unwrap();
        let err = PrevResult::parse(&raw, "eth0").unwrap_err();
        assert!(err.code == Code::Config && err.msg.contains("chained"));
        for text in ["null", "[]", "7", r#"{"ips":{}}"#, r#"{"ips":[{"address":"nonsense"}]}"#] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
