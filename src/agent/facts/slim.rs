//! Kubernetes objects of which only what is read is kept in memory: a Node with its images is tens of kilobytes, its
//! share of the pod CIDRs is one line.

use std::{borrow::Cow, collections::BTreeMap};

use kube::{
    Resource,
    api::{ApiResource, DynamicObject, GroupVersionKind, ObjectMeta},
};
use serde::{Deserialize, Deserializer};

/// An object, reduced to its identity, its spec of type `S` and a ConfigMap's data.
#[derive(Clone, Debug)]
pub struct Slim<S> {
    meta: ObjectMeta,
    /// `spec`; the default where it is missing.
    pub spec: S,
    /// `data`; empty in all but ConfigMaps.
    pub data: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
}

#[derive(Deserialize)]
struct Raw<S> {
    metadata: Meta,
    spec: Option<S>,
    data: Option<BTreeMap<String, String>>,
}

impl<'de, S: Deserialize<'de> + Default> Deserialize<'de> for Slim<S> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Raw { metadata, spec, data } = Raw::deserialize(deserializer)?;
        let Meta { name, namespace, uid, resource_version } = metadata;
        let meta = ObjectMeta { name, namespace, uid, resource_version, ..ObjectMeta::default() };
        Ok(Self { meta, spec: spec.unwrap_or_default(), data: data.unwrap_or_default() })
    }
}

impl<S> Resource for Slim<S> {
    type DynamicType = ApiResource;
    type Scope = <DynamicObject as Resource>::Scope;

    fn kind(kind: &ApiResource) -> Cow<'_, str> {
        kind.kind.as_str().into()
    }

    fn group(kind: &ApiResource) -> Cow<'_, str> {
        kind.group.as_str().into()
    }

    fn version(kind: &ApiResource) -> Cow<'_, str> {
        kind.version.as_str().into()
    }

    fn plural(kind: &ApiResource) -> Cow<'_, str> {
        kind.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

/// A kind of the API, by group, version, kind and plural.
pub fn kind(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}
