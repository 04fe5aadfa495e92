//! Objects in a real API server, by their JSON.
#![allow(dead_code, clippy::allow_attributes, reason = "every test binary uses another part of this module")]
#![allow(clippy::indexing_slicing, clippy::print_stderr, reason = "tests")]

use std::time::Duration;

use crosslink_testkit::probe::wait_until;
use kube::{
    Api, Client,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams},
    core::GroupVersionKind,
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::apiserver::ApiServer;

/// An API server and a client with every right.
pub struct Objects {
    /// The server.
    pub server: ApiServer,
    runtime: Runtime,
    client: Client,
}

impl Objects {
    /// Starts a server; none where that cannot be.
    pub fn start() -> Option<Self> {
        let server = ApiServer::start()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = runtime.block_on(server.client());
        Some(Self { server, runtime, client })
    }

    fn api(&self, api_version: &str, kind: &str, namespace: Option<&str>) -> Api<DynamicObject> {
        let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
        let plural = match kind {
            "BlockAffinity" => "blockaffinities".to_owned(),
            _ => format!("{}s", kind.to_lowercase()),
        };
        let kind = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), &plural);
        match namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &kind),
            None => Api::all_with(self.client.clone(), &kind),
        }
    }

    fn api_of(&self, object: &Value) -> (Api<DynamicObject>, String) {
        let text = |path: &str| object.pointer(path).and_then(Value::as_str);
        let api = self.api(text("/apiVersion").unwrap(), text("/kind").unwrap(), text("/metadata/namespace"));
        (api, text("/metadata/name").unwrap().to_owned())
    }

    /// Creates an object, or makes it say this.
    pub fn apply(&self, object: &Value) {
        let (api, name) = self.api_of(object);
        let params = PatchParams::apply("test").force();
        let applied = self.runtime.block_on(api.patch(&name, &params, &Patch::Apply(object)));
        applied.unwrap_or_else(|err| panic!("{object}: {err}"));
    }

    /// [`Self::apply`] for the status.
    pub fn apply_status(&self, object: &Value) {
        let (api, name) = self.api_of(object);
        let params = PatchParams::apply("test").force();
        let applied = self.runtime.block_on(api.patch_status(&name, &params, &Patch::Apply(object)));
        applied.unwrap_or_else(|err| panic!("{object}: {err}"));
    }

    /// Deletes an object.
    pub fn delete(&self, object: &Value) {
        let (api, name) = self.api_of(object);
        self.runtime.block_on(api.delete(&name, &DeleteParams::default())).unwrap();
    }

    /// Objects of a kind, as JSON; none where it is not served.
    pub fn list(&self, api_version: &str, kind: &str, namespace: Option<&str>) -> Vec<Value> {
        let api = self.api(api_version, kind, namespace);
        let found = self.runtime.block_on(api.list(&ListParams::default()));
        found.map_or_else(
            |_| Vec::new(),
            |list| list.items.iter().map(|item| serde_json::to_value(item).unwrap()).collect(),
        )
    }

    /// Defines a kind without any schema, and waits until it is served. Plurals as [`Self::apply`] knows them.
    pub fn define(&self, api_version: &str, kind: &str, namespaced: bool) {
        let (group, version) = api_version.split_once('/').unwrap();
        let plural = match kind {
            "BlockAffinity" => "blockaffinities".to_owned(),
            _ => format!("{}s", kind.to_lowercase()),
        };
        self.apply(&json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.{group}")},
            "spec": {
                "group": group, "scope": if namespaced { "Namespaced" } else { "Cluster" },
                "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase(), "listKind": format!("{kind}List")},
                "versions": [{"name": version, "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": true}}}],
            },
        }));
        self.wait_served(api_version, kind);
    }

    /// Waits until a kind is served.
    pub fn wait_served(&self, api_version: &str, kind: &str) {
        let api = self.api(api_version, kind, None);
        wait_until("the kind is served", Duration::from_secs(30), || {
            self.runtime.block_on(api.list(&ListParams::default().limit(1))).is_ok()
        });
    }
}

/// A cluster-scoped object.
pub fn object(api_version: &str, kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": name}, "spec": spec})
}

/// A ConfigMap in kube-system.
pub fn config_map(name: &str, data: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "kube-system"}, "data": data})
}

/// A Node with a share of the pod CIDRs.
pub fn node(name: &str, cidr: &str) -> Value {
    object("v1", "Node", name, &json!({"podCIDR": cidr, "podCIDRs": [cidr]}))
}
