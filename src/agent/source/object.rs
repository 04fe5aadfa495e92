//! Objects of the API server, as far as a source looks at them.

use std::borrow::Cow;

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{
    Resource,
    core::{ApiResource, DynamicResourceScope},
};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use serde_json::{Map, Value};

/// An object, or why it is malformed. Metadata can be relied on, since the API server checks them whatever the schema
/// is; so a malformed object neither stops a watch nor hides its own deletion.
#[derive(Clone, Debug)]
pub struct Object<T> {
    /// Only what sources need.
    pub meta: ObjectMeta,
    /// `spec` and `status`, or why they cannot be read.
    pub body: Result<T, String>,
}

/// The fields of metadata that sources need. `managedFields`, often most of an object, are skipped.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<Timestamp>,
    deletion_timestamp: Option<Timestamp>,
    labels: Option<std::collections::BTreeMap<String, String>>,
    annotations: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct Raw {
    metadata: Meta,
    #[serde(default)]
    spec: Value,
    #[serde(default)]
    status: Value,
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Raw { metadata, spec, status } = Raw::deserialize(deserializer)?;
        let meta = ObjectMeta {
            name: metadata.name,
            namespace: metadata.namespace,
            uid: metadata.uid,
            resource_version: metadata.resource_version,
            generation: metadata.generation,
            creation_timestamp: metadata.creation_timestamp.map(Time),
            deletion_timestamp: metadata.deletion_timestamp.map(Time),
            labels: metadata.labels,
            annotations: metadata.annotations,
            ..ObjectMeta::default()
        };
        // serde would read a struct from a list, too. A status that is none is nobody's fault who wrote the spec.
        let parts = [("spec", spec), ("status", status)];
        let odd = parts.iter().any(|(key, value)| *key == "spec" && !value.is_object() && !value.is_null());
        let objects = parts.into_iter().filter(|(_, value)| value.is_object());
        let objects: Map<String, Value> = objects.map(|(key, value)| (key.to_owned(), value)).collect();
        let body = match odd {
            true => Err("spec is not an object".to_owned()),
            false => serde_json::from_value(Value::Object(objects)).map_err(|err| err.to_string()),
        };
        Ok(Self { meta, body })
    }
}

impl<T> Resource for Object<T> {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

impl<T> Object<T> {
    /// Namespace, empty for cluster-scoped kinds, and name.
    pub fn key(&self) -> Key {
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        (text(&self.meta.namespace), text(&self.meta.name))
    }
}

/// Namespace and name.
pub type Key = (String, String);

/// A key for messages.
pub fn shown((namespace, name): &Key) -> String {
    if namespace.is_empty() { name.clone() } else { format!("{namespace}/{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, Deserialize)]
    struct Body {
        spec: Spec,
    }

    #[derive(Clone, Debug, Deserialize)]
    struct Spec {
        size: u8,
    }

    fn read(text: &str) -> Object<Body> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn a_malformed_object_keeps_its_name() {
        let meta =
            r#""metadata":{"name":"a","namespace":"n","creationTimestamp":"2026-11-21T07:13:52Z","managedFields":[7]}"#;
        for (rest, good) in [
            (r#","spec":{"size":3,"more":1},"status":7"#, true),
            (r#","spec":{"size":"3"}"#, false),
            (r#","spec":{"size":300}"#, false),
            (r#","spec":[]"#, false),
            (r#","spec":null"#, false),
            ("", false),
        ] {
            let object = read(&format!("{{{meta}{rest}}}"));
            assert_eq!(object.key(), ("n".into(), "a".into()));
            assert_eq!(object.body.is_ok_and(|body| body.spec.size == 3), good, "{rest}");
        }
    }
}
