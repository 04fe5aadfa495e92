//! The real kernel.

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use crosslink_core::{
    model::{Address, Change, Family, Link, NetnsState, ObservedRoute, Route, Side, Sysctl},
    numbers::{TABLE_MAIN, TABLE_PODS},
    record::NetnsId,
};
use nix::{
    errno::Errno,
    fcntl::{Flock, OFlag, openat},
    sys::stat::Mode,
};

use crate::{
    Applied, Kernel, NodeQuery, PodQuery, decode, encode,
    error::Error,
    netns::{self, Netns},
    socket::{Fate, Request, Socket},
};

/// Longest sysctl value that is read.
const SYSCTL_LIMIT: u64 = 128;

/// The kernel as it is. The node's side works in the network namespace in which this was made.
#[derive(Debug)]
pub struct System {
    node: Namespace,
    pod: Option<Sandbox>,
}

#[derive(Debug)]
struct Sandbox {
    netns: Netns,
    inside: Namespace,
    _lock: Flock<File>,
}

/// One network namespace: a socket in it, and its sysctls.
#[derive(Debug)]
struct Namespace {
    socket: Socket,
    /// `/proc/sys/net/ipv4/conf` and `ipv6/conf` as this namespace sees them. `/proc/sys/net` follows the thread, but a
    /// directory once opened stays with the namespace it was opened in; so one setns is enough.
    conf: BTreeMap<&'static str, OwnedFd>,
    /// Interface indices by name.
    links: BTreeMap<String, u32>,
}

impl Namespace {
    fn open() -> Result<Self, Error> {
        let mut conf = BTreeMap::new();
        for (family, path) in [("ipv4", "/proc/sys/net/ipv4/conf"), ("ipv6", "/proc/sys/net/ipv6/conf")] {
            match nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()) {
                Ok(fd) => drop(conf.insert(family, fd)),
                // A kernel without IPv6 has no such directory.
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(Error::File { what: "open", path: path.into(), errno }),
            }
        }
        Ok(Self { socket: Socket::open()?, conf, links: BTreeMap::new() })
    }

    fn sysctl(&self, key: &str, write: Option<&str>) -> Result<Option<String>, Error> {
        let path = || PathBuf::from(format!("/proc/sys/net/{key}"));
        let Some((family, rest)) = key.split_once("/conf/") else {
            return Err(Error::File { what: "find sysctl", path: path(), errno: Errno::EINVAL });
        };
        let flags = if write.is_some() { OFlag::O_WRONLY } else { OFlag::O_RDONLY };
        let opened = match self.conf.get(family) {
            Some(dir) => openat(dir.as_fd(), rest, flags | OFlag::O_CLOEXEC, Mode::empty()),
            // A kernel without that family needs no setting of it.
            None if write.is_some() => return Ok(Some(String::new())),
            None => Err(Errno::ENOENT),
        };
        let (what, file) = match (opened, write) {
            (Ok(fd), Some(_)) => ("write sysctl", File::from(fd)),
            (Ok(fd), None) => ("read sysctl", File::from(fd)),
            (Err(Errno::ENOENT), None) => return Ok(None),
            (Err(errno), _) => return Err(Error::File { what: "open sysctl", path: path(), errno }),
        };
        let done = match write {
            // Writing IPv6's takes the kernel's network lock, for which all pods of a node compete; reading does not.
            Some(value) if self.sysctl(key, None)?.as_deref() == Some(value) => Ok(String::new()),
            Some(value) => std::io::Write::write_all(&mut &file, value.as_bytes()).map(|()| String::new()),
            None => netns::read_limited(&file, SYSCTL_LIMIT)
                .map(|bytes| String::from_utf8_lossy(&bytes).trim_end().to_owned()),
        };
        done.map(Some).map_err(|err| Error::file(what, path(), &err))
    }

    fn sysctls(&self, keys: &[String], state: &mut NetnsState) -> Result<(), Error> {
        for key in keys {
            if let Some(value) = self.sysctl(key, None)? {
                state.sysctls.insert(key.clone(), value);
            }
        }
        Ok(())
    }

    fn links(&mut self) -> Result<Vec<Link>, Error> {
        let links = self.socket.dump("list interfaces", &encode::dump_links(), |links: &mut Vec<Link>, received| {
            links.push(decode::link(received)?);
            Ok(())
        })?;
        self.links = links.iter().map(|link| (link.name.clone(), link.index)).collect();
        Ok(links)
    }

    fn addresses(&mut self, links: &[Link]) -> Result<Vec<Address>, Error> {
        let names = |index| name_of(links, index);
        self.socket.dump("list addresses", &encode::dump_addresses(), |list: &mut Vec<Address>, received| {
            list.extend(decode::address(received, &names));
            Ok(())
        })
    }

    fn routes(&mut self, links: &[Link], table: u32) -> Result<Vec<ObservedRoute>, Error> {
        let names = |index| name_of(links, index);
        let mut all = Vec::new();
        for family in Family::ALL {
            let request = encode::dump_routes(family, table);
            let take = |list: &mut Vec<ObservedRoute>, received: crate::socket::Received<'_>| {
                list.extend(decode::route(received, &names).filter(|seen| seen.route.table == table));
                Ok(())
            };
            match self.socket.dump("list routes", &request, take) {
                Ok(routes) => all.extend(routes),
                // No route was ever put into that table; or the kernel has no such family.
                Err(Error::Netlink { errno: Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT, .. }) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(all)
    }

    fn neighbours(&mut self, link: &Link, state: &mut NetnsState) -> Result<(), Error> {
        let names = |_| link.name.clone();
        let request = encode::dump_neighbours(link.index);
        let found = self.socket.dump("list neighbours", &request, |list: &mut Vec<_>, received| {
            list.extend(decode::neighbour(received, &names));
            Ok(())
        })?;
        state.neighbours.extend(found);
        Ok(())
    }

    fn rules(&mut self, state: &mut NetnsState) -> Result<(), Error> {
        for family in Family::ALL {
            let taken = self.socket.dump("list rules", &encode::dump_rules(family), |list: &mut Vec<_>, received| {
                list.extend(decode::rule(received));
                Ok(())
            });
            match taken {
                Ok(rules) => state.rules.extend(rules),
                Err(Error::Netlink { errno: Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT, .. }) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }

    fn link_by_name(&mut self, name: &str) -> Result<Option<Link>, Error> {
        self.socket.get("find an interface by name", &encode::get_link_by_name(name), decode::link)
    }

    /// Index of an interface, looked up once.
    fn index(&mut self, name: &str) -> Result<u32, Error> {
        let unnamed = name.strip_prefix(UNNAMED).and_then(|index| index.parse().ok());
        if let Some(index) = unnamed.or_else(|| self.links.get(name).copied()) {
            return Ok(index);
        }
        let missing = || Error::Netlink { what: format!("find interface {name}"), errno: Errno::ENODEV };
        let index = self.link_by_name(name)?.ok_or_else(missing)?.index;
        self.links.insert(name.to_owned(), index);
        Ok(index)
    }
}

/// Prefix of the stand-in for the name of an interface that was not looked up. ":" cannot be in a name.
const UNNAMED: &str = "index:";

fn name_of(links: &[Link], index: u32) -> String {
    let found = links.iter().find(|link| link.index == index);
    found.map_or_else(|| format!("{UNNAMED}{index}"), |link| link.name.clone())
}

impl System {
    /// Opens the node's side, in the calling thread's network namespace.
    ///
    /// # Errors
    /// No netlink socket can be had.
    pub fn new() -> Result<Self, Error> {
        Ok(Self { node: Namespace::open()?, pod: None })
    }

    /// The node's number for the sandbox (nsid), by which [`crate::notify`] names it; one is given to it if it has none.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn number(&mut self) -> Result<Option<u32>, Error> {
        let sandbox = self.pod.as_ref().ok_or(Error::NoSandbox)?.netns.file().as_raw_fd();
        if let Some(number) = self.known_number(sandbox)? {
            return Ok(Some(number));
        }
        // Refused where another process was faster, which is as well.
        let _ = self.node.socket.batch("number the sandbox", &[encode::set_netnsid(sandbox)]);
        self.known_number(sandbox)
    }

    fn known_number(&mut self, sandbox: std::os::fd::RawFd) -> Result<Option<u32>, Error> {
        let take = |received: crate::socket::Received<'_>| Ok(decode::netnsid(received));
        let found = self.node.socket.get("find the sandbox's number", &encode::get_netnsid(sandbox), take)?;
        Ok(found.flatten())
    }

    fn side(&mut self, side: Side) -> Result<&mut Namespace, Error> {
        match side {
            Side::Node => Ok(&mut self.node),
            Side::Pod => self.pod.as_mut().map(|pod| &mut pod.inside).ok_or(Error::NoSandbox),
        }
    }

    /// The node's interface of that index, if its other end is in the sandbox. Indices count per namespace, so that the
    /// same one on the node says nothing by itself.
    fn peer_of_sandbox(&mut self, index: u32) -> Result<Option<Link>, Error> {
        let sandbox = self.pod.as_ref().ok_or(Error::NoSandbox)?.netns.file().as_raw_fd();
        let socket = &mut self.node.socket;
        let take =
            |received: crate::socket::Received<'_>| Ok((decode::link(received)?, decode::link_netnsid(received)));
        let found = socket.get("find an interface by index", &encode::get_link_by_index(index), take)?;
        let Some((link, Some(peer))) = found else { return Ok(None) };
        Ok((self.known_number(sandbox)? == Some(peer)).then_some(link))
    }

    /// Translates one change, or carries it out where it is no message of a batch.
    fn step(&mut self, change: &Change) -> Result<Step, Error> {
        Ok(match change {
            Change::CreateVeth(veth) => {
                let pod = self.pod.as_mut().ok_or(Error::NoSandbox)?;
                // Names that a deleted pair had before mean another index from now on.
                pod.inside.links.remove(&veth.pod);
                self.node.links.remove(&veth.node);
                let sandbox = pod.netns.file().as_raw_fd();
                Step::Send(Side::Node, encode::create_veth(veth, sandbox))
            }
            Change::DeleteNodeLink(name) => {
                self.node.links.remove(name);
                Step::Send(Side::Node, encode::delete_link(name))
            }
            Change::SetMtu(side, name, mtu) => Step::Send(*side, encode::set_mtu(self.side(*side)?.index(name)?, *mtu)),
            Change::SetUp(side, name) => Step::Send(*side, encode::set_up(self.side(*side)?.index(name)?)),
            Change::SetSysctl(Sysctl { side, key, value }, _) => {
                self.side(*side)?.sysctl(key, Some(value))?;
                Step::Done
            }
            Change::AddAddress(dev, addr) => {
                Step::Send(Side::Pod, encode::add_address(*addr, self.side(Side::Pod)?.index(dev)?))
            }
            Change::SetNeighbour(side, neighbour) => {
                let dev = self.side(*side)?.index(&neighbour.dev)?;
                Step::Send(*side, encode::set_neighbour(neighbour, dev))
            }
            Change::AddRule(rule) => Step::Send(Side::Node, encode::add_rule(rule)),
            Change::AddRoute(side, route) => self.route(*side, route, encode::add_route)?,
            Change::ReplaceRoute(side, route, _) => self.route(*side, route, encode::replace_route)?,
            Change::DeleteRoute(side, route) => self.route(*side, route, encode::delete_route)?,
        })
    }

    fn route(&mut self, side: Side, route: &Route, make: fn(&Route, u32) -> Request) -> Result<Step, Error> {
        let dev = self.side(side)?.index(&route.dev)?;
        Ok(Step::Send(side, make(route, dev)))
    }

    /// Whether later changes need to see this one done: they look up names that it makes or removes.
    const fn is_barrier(change: &Change) -> bool {
        matches!(change, Change::CreateVeth(_) | Change::DeleteNodeLink(_))
    }
}

enum Step {
    Done,
    Send(Side, Request),
}

/// Requests of one side that wait to be sent together.
struct Pending<'c> {
    side: Side,
    requests: Vec<Request>,
    changes: Vec<(usize, &'c Change)>,
}

impl Pending<'_> {
    const fn new() -> Self {
        Self { side: Side::Node, requests: Vec::new(), changes: Vec::new() }
    }

    fn flush(&mut self, system: &mut System, applied: &mut Applied) -> Result<(), Error> {
        if self.requests.is_empty() {
            return Ok(());
        }
        let what = self.changes.first().map(|(_, change)| change.to_string()).unwrap_or_default();
        let fates = system.side(self.side)?.socket.batch(&what, &std::mem::take(&mut self.requests));
        for ((place, change), fate) in self.changes.drain(..).zip(fates) {
            match fate {
                Fate::Done => applied.done.push(place),
                Fate::Unknown => applied.unknown.push(place),
                Fate::Refused(errno) if harmless(change, errno) => applied.done.push(place),
                Fate::Refused(errno) => {
                    applied.failures.push((place, Error::Netlink { what: change.to_string(), errno }))
                }
            }
        }
        Ok(())
    }
}

/// Whether a refusal says that the change was there already: another pod's ADD made the rule, a link took its routes
/// with it.
const fn harmless(change: &Change, errno: Errno) -> bool {
    match change {
        Change::AddRule(_) | Change::AddAddress(..) => matches!(errno, Errno::EEXIST),
        Change::DeleteNodeLink(_) => matches!(errno, Errno::ENODEV),
        Change::DeleteRoute(..) => matches!(errno, Errno::ESRCH | Errno::ENOENT | Errno::ENODEV),
        Change::CreateVeth(_)
        | Change::SetMtu(..)
        | Change::SetUp(..)
        | Change::SetSysctl(..)
        | Change::SetNeighbour(..)
        | Change::AddRoute(..)
        | Change::ReplaceRoute(..) => false,
    }
}

impl Kernel for System {
    fn enter(&mut self, path: &Path, wait: Duration) -> Result<NetnsId, Error> {
        netns::require_capabilities()?;
        let netns = Netns::open(path)?;
        let lock = netns.lock(wait)?;
        netns.enter()?;
        let inside = Namespace::open()?;
        let id = netns.identity(&inside.socket)?;
        self.pod = Some(Sandbox { netns, inside, _lock: lock });
        Ok(id)
    }

    fn identify(&mut self, path: &Path) -> Option<NetnsId> {
        netns::identify(path)
    }

    fn observe_pod(&mut self, query: &PodQuery) -> Result<NetnsState, Error> {
        let inside = self.side(Side::Pod)?;
        let mut state = NetnsState::default();
        if query.state {
            state.links = inside.links()?;
            state.addresses = inside.addresses(&state.links)?;
            state.routes = inside.routes(&state.links, TABLE_MAIN)?;
        }
        if let Some(link) = query.veth.as_ref().map(|name| inside.link_by_name(name)).transpose()?.flatten() {
            inside.neighbours(&link, &mut state)?;
        }
        inside.sysctls(&query.sysctls, &mut state)?;
        Ok(state)
    }

    fn observe_node(&mut self, query: &NodeQuery) -> Result<NetnsState, Error> {
        let mut state = NetnsState::default();
        if query.addresses {
            state.links = self.node.links()?;
            state.addresses = self.node.addresses(&state.links)?;
            state.routes = self.node.routes(&state.links, TABLE_MAIN)?;
        }
        if let Some(index) = query.peer {
            let found = self.peer_of_sandbox(index)?;
            state.links.extend(found.filter(|found| state.links.iter().all(|link| link.index != found.index)));
        }
        let node = &mut self.node;
        if let Some(name) = &query.veth {
            let link = node.link_by_name(name)?;
            if let Some(link) = &link {
                node.links.insert(name.clone(), link.index);
                node.neighbours(link, &mut state)?;
            }
            state.links.extend(link.filter(|found| state.links.iter().all(|link| link.index != found.index)));
        }
        if query.pods_table {
            let routes = node.routes(&state.links, TABLE_PODS)?;
            state.routes.extend(routes);
            node.rules(&mut state)?;
        }
        node.sysctls(&query.sysctls, &mut state)?;
        Ok(state)
    }

    fn apply(&mut self, changes: &[Change]) -> Applied {
        let mut applied = Applied::default();
        let mut pending = Pending::new();
        for (place, change) in changes.iter().enumerate() {
            let step = match self.step(change) {
                // A name that is not there yet may be made by what still waits to be sent.
                Err(Error::Netlink { errno: Errno::ENODEV, .. }) if !pending.requests.is_empty() => {
                    if let Err(err) = pending.flush(self, &mut applied) {
                        applied.failures.push((place, err));
                        return applied;
                    }
                    self.step(change)
                }
                other => other,
            };
            let outcome = match step {
                Ok(Step::Done) => {
                    applied.done.push(place);
                    Ok(())
                }
                Ok(Step::Send(side, request)) => {
                    self.queue(&mut pending, (side, request), (place, change), &mut applied)
                }
                // What is gone with its link need not be deleted.
                Err(Error::Netlink { errno, .. }) if harmless(change, errno) => {
                    applied.done.push(place);
                    Ok(())
                }
                Err(err) => Err(err),
            };
            if let Err(err) = outcome {
                applied.failures.push((place, err));
            }
            if !applied.failures.is_empty() {
                break;
            }
        }
        if let Err(err) = pending.flush(self, &mut applied) {
            applied.failures.push((changes.len(), err));
        }
        applied
    }
}

impl System {
    fn queue<'c>(
        &mut self,
        pending: &mut Pending<'c>,
        (side, request): (Side, Request),
        (place, change): (usize, &'c Change),
        applied: &mut Applied,
    ) -> Result<(), Error> {
        if pending.side != side || Self::is_barrier(change) {
            pending.flush(self, applied)?;
            pending.side = side;
            if !applied.failures.is_empty() {
                return Ok(());
            }
        }
        pending.requests.push(request);
        pending.changes.push((place, change));
        if Self::is_barrier(change) {
            pending.flush(self, applied)?;
        }
        Ok(())
    }
}
