//! What several kinds have in common.

use kube::core::Rule;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// A condition, as in `metav1.Condition`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `Accepted`, `Conflicting` or `Reachable`.
    #[serde(rename = "type")]
    #[schemars(length(max = 316))]
    pub kind: String,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// Why, in CamelCase.
    #[schemars(length(max = 1024))]
    pub reason: String,
    /// Why, in words.
    #[schemars(length(max = 32768))]
    pub message: String,
    /// When `status` last changed, RFC 3339.
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
    /// `metadata.generation` of the object that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It does.
    True,
    /// It does not.
    False,
    /// Nobody has found out.
    Unknown,
}

impl ConditionStatus {
    /// From a yes or no.
    pub const fn of(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

/// Most CIDRs of a list in an object. The API server weighs the worst case of every rule against a budget.
pub const CIDRS_LIMIT: u64 = 100;

/// Longest CIDR in text: 39 characters of an IPv6 address, and `/128`.
const CIDR_LENGTH: u64 = 43;

/// A list of CIDRs: a schema with the rules that each of them must keep.
pub fn cidrs(_: &mut SchemaGenerator) -> Schema {
    let rules = [
        Rule::new("isCIDR(self)")
            .message("not a CIDR: write address/length, as 10.1.0.0/16 or fd00:1::/48, without leading zeros"),
        Rule::new("!isCIDR(self) || cidr(self) == cidr(self).masked()")
            .message("the address has bits beyond the prefix length: write the network address, as 10.1.0.0/16"),
        Rule::new("!isCIDR(self) || cidr(self).prefixLength() >= (cidr(self).ip().family() == 4 ? 4 : 8)")
            .message("too wide: at least /4 for IPv4 and /8 for IPv6"),
        Rule::new(
            "!isCIDR(self) || !(cidr(self).ip().isLoopback() || cidr(self).ip().isLinkLocalUnicast() || \
             cidr('224.0.0.0/4').containsIP(cidr(self).ip()) || cidr('ff00::/8').containsIP(cidr(self).ip()) || \
             cidr('0.0.0.0/8').containsIP(cidr(self).ip()) || cidr(self).ip().isUnspecified())",
        )
        .message("loopback, link-local, multicast and unspecified addresses are never remote"),
    ];
    json_schema!({
        "type": "array",
        "maxItems": CIDRS_LIMIT,
        "items": { "type": "string", "maxLength": CIDR_LENGTH, "x-kubernetes-validations": rules },
    })
}
