//! The Node object, as far as others refer to it.

use k8s_openapi::api::core::v1::{Node, ObjectReference};
use kube::{Api, Client};

/// The UID of a Node; none where there is no such Node, or it may not be read.
///
/// # Errors
/// The API server cannot be asked.
pub async fn uid(client: &Client, name: &str) -> Result<Option<String>, kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    match nodes.get_metadata_opt(name).await {
        Ok(node) => Ok(node.and_then(|node| node.metadata.uid)),
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(None),
        Err(err) => Err(err),
    }
}

/// A reference for events. Where the UID is not known the name stands for it, as in the kubelet's own events;
/// `kubectl describe node` looks for both.
pub fn reference(name: &str, uid: Option<String>) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        name: Some(name.to_owned()),
        uid: Some(uid.unwrap_or_else(|| name.to_owned())),
        ..ObjectReference::default()
    }
}
