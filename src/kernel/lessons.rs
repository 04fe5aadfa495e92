//! What a round of changes teaches the next one. Facts about the node and remote CIDRs must never stop a pod, so what the
//! kernel refuses of them is left out, with a finding; what was named, and everything else, is an error.

use crosslink_core::{
    destinations::Refusal,
    error::{Code, Error},
    finding::{Finding, Id},
    model::{Change, Route, Side},
    node::NodeFacts,
    wanted::Wanted,
};
use nix::errno::Errno;

use crate::{Error as KernelError, Kernel, NodeQuery};

/// What was learned so far.
#[derive(Debug)]
pub struct Lessons {
    /// `node.json`, without addresses that the node turned out not to have.
    pub node: NodeFacts,
    /// Routes in the pod that the kernel does not take.
    pub refused: Vec<Route>,
    /// What to tell.
    pub findings: Vec<Finding>,
    /// Changes that met something that had not been there when it was looked.
    met: Vec<Change>,
    node_checked: bool,
    refusal: Refusal,
}

impl Lessons {
    /// Nothing learned yet.
    pub const fn new(node: NodeFacts, refusal: Refusal) -> Self {
        Self { node, refused: Vec::new(), findings: Vec::new(), met: Vec::new(), node_checked: false, refusal }
    }

    /// Takes a refusal in.
    ///
    /// # Errors
    /// The refusal, where the next round would do no better.
    pub fn learn(
        &mut self,
        change: Option<&Change>,
        err: KernelError,
        wanted: &Wanted,
        kernel: &mut dyn Kernel,
    ) -> Result<(), Error> {
        let (KernelError::Netlink { errno, .. }, Some(change)) = (&err, change) else { return Err(err.into()) };
        match (*errno, change) {
            // Somebody came between looking and changing. If it is there again, it is something that looking does not see.
            (Errno::EEXIST, change) if !self.met.contains(change) => self.met.push(change.clone()),
            (Errno::EEXIST, Change::AddRoute(Side::Pod, route)) => {
                let text = format!("{}: another owner holds it", route.dst);
                self.leave_out(route, wanted, Code::RouteConflict, Finding::new(Id::RouteConflict, text))?;
            }
            (Errno::EEXIST, Change::CreateVeth(veth)) => {
                let text = format!(
                    "an interface already has {} (pod) or {} (node) as a name or alternative name: set vethName to another name",
                    veth.pod, veth.node
                );
                return Err(Error::new(Code::NoInterface, text));
            }
            // A source address that the node does not have (any more): node.json is out of date.
            (Errno::EINVAL, Change::AddRoute(Side::Node, route) | Change::ReplaceRoute(Side::Node, route, _))
                if route.src.is_some() =>
            {
                self.check_node(kernel)?;
                // One that the node does have was refused for another reason.
                if route.src.is_some_and(|src| self.node.addresses.contains(&src)) {
                    return Err(err.into());
                }
            }
            (
                Errno::EINVAL | Errno::ENETUNREACH | Errno::EHOSTUNREACH,
                Change::AddRoute(Side::Pod, route) | Change::ReplaceRoute(Side::Pod, route, _),
            ) => {
                let finding = Finding::new(Id::RouteRefused, err.to_string());
                let known = wanted.pod_routes.iter().find(|wanted| wanted.route == *route);
                // The way to the node itself and to the own cluster is not optional.
                if known.is_none_or(|known| known.cluster.is_none() && known.named.is_none()) {
                    return Err(err.into());
                }
                self.leave_out(route, wanted, Code::Io, finding)?;
            }
            _ => return Err(err.into()),
        }
        Ok(())
    }

    fn leave_out(&mut self, route: &Route, wanted: &Wanted, code: Code, finding: Finding) -> Result<(), Error> {
        let named = wanted.pod_routes.iter().find(|wanted| wanted.route == *route);
        let named = named.and_then(|route| route.named.as_ref());
        if let Some(place) = named.filter(|_| self.refusal == Refusal::Error) {
            return Err(Error::new(code, format!("{place}: {}: remove the CIDR, or what is in its way", finding.text)));
        }
        self.refused.push(route.clone());
        self.findings.push(finding);
        Ok(())
    }

    /// Drops every address that the node does not have; looks once.
    fn check_node(&mut self, kernel: &mut dyn Kernel) -> Result<(), Error> {
        if std::mem::replace(&mut self.node_checked, true) {
            return Ok(());
        }
        let state = kernel.observe_node(&NodeQuery { addresses: true, ..NodeQuery::default() })?;
        let (real, wrong): (Vec<_>, Vec<_>) = std::mem::take(&mut self.node.addresses)
            .into_iter()
            .partition(|addr| state.addresses.iter().any(|known| known.net.addr() == *addr));
        self.node.addresses = real;
        let texts = wrong.iter().map(|addr| format!("{addr} of node.json is not an address of this node"));
        self.findings.extend(texts.map(|text| Finding::new(Id::NodeAddresses, text)));
        Ok(())
    }
}
