//! Submariner's objects as recorded from a real one (version 0.19, VXLAN cable), reduced to what is read.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const HOLD: Duration = Duration::from_secs(60);
const NAMESPACE: &str = "submariner-operator";

fn read<B: serde::de::DeserializeOwned>(mut object: Value, labelled: bool) -> Notice<B> {
    if object["metadata"]["namespace"].is_null() {
        object["metadata"]["namespace"] = json!(NAMESPACE);
    }
    if labelled {
        object["metadata"]["labels"] = json!({"submariner-io/clusterID": object["spec"]["cluster_id"]});
    }
    Notice::Seen(Box::new(serde_json::from_value(object).unwrap()))
}

/// An `Endpoint` made `created` seconds into a minute.
fn endpoint_of(cluster: &str, ip: u8, created: u8, subnets: &[&str]) -> Event {
    let name = format!("{cluster}-submariner-cable-{cluster}-172-18-0-{ip}");
    Event::Endpoint(read(
        json!({"metadata": {"name": name, "creationTimestamp": format!("2026-11-21T07:13:{created:02}Z")},
            "spec": {"cluster_id": cluster, "backend": "vxlan", "subnets": subnets, "nat_enabled": false,
                "cable_name": "x", "hostname": "x", "private_ip": "x", "public_ip": ""}}),
        cluster != "cluster-a",
    ))
}

fn endpoint_gone(cluster: &str, ip: u8) -> Event {
    let name = format!("{cluster}-submariner-cable-{cluster}-172-18-0-{ip}");
    Event::Endpoint(Notice::Gone((NAMESPACE.into(), name)))
}

fn cluster_of(cluster: &str, pods: &[&str], services: &[&str], global: Value) -> Event {
    Event::Cluster(read(
        json!({"metadata": {"name": cluster}, "spec": {"cluster_id": cluster, "color_codes": ["blue"],
            "cluster_cidr": pods, "service_cidr": services, "global_cidr": global}}),
        cluster != "cluster-a",
    ))
}

fn cluster_gone(cluster: &str) -> Event {
    Event::Cluster(Notice::Gone((NAMESPACE.into(), cluster.into())))
}

fn gateway_of(subnets: &[&str]) -> Event {
    Event::Gateway(read(
        json!({"metadata": {"name": "subm-a-control-plane"}, "status": {"haStatus": "active",
            "localEndpoint": {"cluster_id": "cluster-a", "subnets": ["10.96.0.0/16", "10.244.0.0/16"]},
            "connections": [{"status": "connected", "latencyRTT": {"last": "447.358µs"},
                "endpoint": {"cluster_id": "cluster-b", "subnets": subnets}}]}}),
        false,
    ))
}

/// Two joined clusters, seen in cluster-a.
fn joined() -> Vec<Event> {
    vec![
        endpoint_of("cluster-a", 3, 52, &["10.96.0.0/16", "10.244.0.0/16"]),
        endpoint_of("cluster-b", 5, 52, &["10.97.0.0/16", "10.245.0.0/16"]),
        cluster_of("cluster-a", &["10.244.0.0/16"], &["10.96.0.0/16"], json!([])),
        cluster_of("cluster-b", &["10.245.0.0/16"], &["10.97.0.0/16"], json!([])),
    ]
}

struct Bench {
    model: Submariner,
    now: Instant,
}

impl Bench {
    fn new(events: Vec<Event>) -> Self {
        Self::after(events, Vec::new())
    }

    fn after(events: Vec<Event>, before: Vec<Told>) -> Self {
        let mut bench = Self { model: Submariner::new(HOLD, before), now: Instant::now() };
        bench.take(Event::Uplink(Some(1500)));
        events.into_iter().for_each(|event| bench.take(event));
        for event in [
            Event::Endpoint(Notice::Complete),
            Event::Cluster(Notice::Complete),
            Event::Gateway(Notice::Complete),
            Event::Submariner(Notice::Absent),
        ] {
            bench.take(event);
        }
        bench
    }

    fn take(&mut self, event: Event) {
        self.model.take(event, self.now);
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
    }

    fn shown(&mut self) -> String {
        let list = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let shown = |told: &Arc<Told>| {
            let mtu = told.mtu.map(|mtu| format!(" {mtu}")).unwrap_or_default();
            format!("{}: {} | {}{mtu}", told.name, list(&told.pod_cidrs), list(&told.service_cidrs))
        };
        self.model.view(self.now).clusters.unwrap().iter().map(shown).collect::<Vec<_>>().join("; ")
    }

    fn ids(&mut self) -> Vec<Id> {
        self.model.view(self.now).findings.iter().map(|finding| finding.id).collect()
    }
}

const B: &str = "cluster-b: 10.245.0.0/16 | 10.97.0.0/16 1450";

#[test]
fn remote_clusters_with_the_split_of_their_cluster_object() {
    assert_eq!(Bench::new(joined()).shown(), B);
    // Whatever tells who is local: the label alone, gateways, the operator's object.
    let mut events = joined();
    events.push(gateway_of(&["10.97.0.0/16", "10.245.0.0/16"]));
    assert_eq!(Bench::new(events).shown(), B);
    let mut bench = Bench::new(joined());
    let operator = json!({"metadata": {"name": "submariner"}, "spec": {"clusterID": "cluster-b"}});
    bench.take(Event::Submariner(read(operator, false)));
    assert_eq!(bench.shown().split(':').next(), Some("cluster-a"), "the operator's word counts most");
}

#[test]
fn nothing_is_said_before_everything_was_read() {
    let mut model = Submariner::new(HOLD, Vec::new());
    let now = Instant::now();
    for event in joined() {
        model.take(event, now);
    }
    for event in [
        Event::Endpoint(Notice::Complete),
        Event::Cluster(Notice::Complete),
        Event::Gateway(Notice::Failed("forbidden".into())),
        Event::Submariner(Notice::Failed("forbidden".into())),
    ] {
        model.take(event, now);
        assert!(model.view(now).clusters.is_none());
    }
    model.take(Event::Uplink(None), now);
    let view = model.view(now);
    assert_eq!((view.clusters.unwrap().len(), view.failure.as_deref()), (1, Some("forbidden")));
}

#[test]
fn a_failover_changes_nothing_in_either_order() {
    let moved = || endpoint_of("cluster-b", 4, 53, &["10.97.0.0/16", "10.245.0.0/16"]);
    let gone = || endpoint_gone("cluster-b", 5);
    for (what, steps) in [("delete then add", [gone(), moved()]), ("add then delete", [moved(), gone()])] {
        let mut bench = Bench::new(joined());
        for step in steps {
            bench.take(step);
            assert_eq!(bench.shown(), B, "{what}");
            bench.wait(Duration::from_millis(20));
        }
        assert!(bench.ids().is_empty());
    }
    // Also where the Cluster object is missing: then the Endpoint alone says it all.
    let mut bench = Bench::new(vec![endpoint_of("cluster-b", 5, 52, &["10.97.0.0/16", "10.245.0.0/16"])]);
    let alone = "cluster-b: 10.97.0.0/16,10.245.0.0/16 |  1450";
    assert_eq!(bench.shown(), alone);
    for step in [gone(), moved()] {
        bench.take(step);
        assert_eq!(bench.shown(), alone);
    }
}

#[test]
fn of_two_endpoints_the_newest_counts() {
    let mut bench = Bench::new(joined());
    bench.take(endpoint_of("cluster-b", 4, 53, &["10.97.0.0/16", "10.245.0.0/16", "10.250.0.0/16"]));
    let newer = "cluster-b: 10.245.0.0/16,10.250.0.0/16 | 10.97.0.0/16 1450";
    assert_eq!(bench.shown(), newer);
    bench.take(endpoint_of("cluster-b", 9, 51, &["10.99.0.0/16"]));
    assert_eq!(bench.shown(), newer);
    bench.take(endpoint_gone("cluster-b", 4));
    assert_eq!(bench.shown(), B);
}

#[test]
fn updates_in_place_are_followed() {
    let mut bench = Bench::new(joined());
    bench.take(endpoint_of("cluster-b", 5, 52, &["10.97.0.0/16", "10.245.0.0/16", "10.246.0.0/16"]));
    assert_eq!(bench.shown(), "cluster-b: 10.245.0.0/16,10.246.0.0/16 | 10.97.0.0/16 1450");
    bench.take(endpoint_of("cluster-b", 5, 52, &["10.97.0.0/16", "10.246.0.0/16"]));
    assert_eq!(bench.shown(), "cluster-b: 10.246.0.0/16 | 10.97.0.0/16 1450");
}

#[test]
fn with_globalnet_only_global_cidrs_are_remote() {
    for global in [json!(["242.1.0.0/16"]), json!("242.1.0.0/16")] {
        let mut events = joined();
        events.push(cluster_of("cluster-b", &["10.244.0.0/16"], &["10.96.0.0/16"], global));
        events.push(endpoint_of("cluster-b", 5, 52, &["242.1.0.0/16"]));
        assert_eq!(Bench::new(events).shown(), "cluster-b: 242.1.0.0/16 |  1450");
    }
}

#[test]
fn ipv6_subnets_and_drivers() {
    for (backend, uplink, mtu) in [
        ("vxlan", Some(9000), " 8950"),
        ("libreswan", Some(1500), " 1380"),
        ("wireguard", Some(1500), " 1380"),
        ("new", Some(1500), " 1380"),
        ("vxlan", None, ""),
        ("libreswan", Some(600), ""),
    ] {
        let object = json!({"metadata": {"name": "e"}, "spec": {"cluster_id": "cluster-b", "backend": backend,
            "subnets": ["fd00:97::/108", "fd00:245::/48"], "healthCheckIPs": ["fd00:245::1"], "private_ips": ["fd01::1"]}});
        let mut bench = Bench::new(vec![Event::Endpoint(read(object, true))]);
        bench.take(Event::Uplink(uplink));
        assert_eq!(bench.shown(), format!("cluster-b: fd00:97::/108,fd00:245::/48 | {mtu}"));
    }
}

#[test]
fn a_cluster_that_left_is_held_for_a_while() {
    let mut bench = Bench::new(joined());
    assert_eq!(bench.shown(), B);
    bench.take(cluster_gone("cluster-b"));
    bench.take(endpoint_gone("cluster-b", 5));
    assert_eq!((bench.shown().as_str(), bench.ids()), (B, vec![Id::SourceEmpty]));
    assert_eq!(bench.model.due(), Some(bench.now + HOLD));
    bench.wait(HOLD - Duration::from_millis(1));
    assert_eq!(bench.shown(), B);
    bench.wait(Duration::from_millis(1));
    assert_eq!((bench.shown().as_str(), bench.ids()), ("", Vec::new()));
}

#[test]
fn what_a_file_said_before_the_agent_started_is_held_too() {
    let mut first = Bench::new(joined());
    let before: Vec<Told> =
        first.model.view(first.now).clusters.unwrap().iter().map(|told| told.as_ref().clone()).collect();
    // Started within the gap of a failover: the driver is not known, and nothing changes.
    let events = vec![cluster_of("cluster-b", &["10.245.0.0/16"], &["10.97.0.0/16"], Value::Null)];
    assert_eq!(Bench::after(events, before.clone()).shown(), B);
    let mut bench = Bench::after(Vec::new(), before);
    assert_eq!(bench.shown(), B);
    bench.wait(HOLD);
    assert_eq!(bench.shown(), "");
}

#[test]
fn a_gateway_that_programmed_something_else_is_named_after_a_moment() {
    let mut events = joined();
    events.push(gateway_of(&["10.97.0.0/16", "10.245.0.0/16"]));
    let mut bench = Bench::new(events);
    assert!(bench.ids().is_empty());
    bench.take(endpoint_of("cluster-b", 5, 52, &["10.97.0.0/16", "10.246.0.0/16"]));
    assert!(bench.ids().is_empty());
    bench.wait(STALE_AFTER);
    assert_eq!(bench.ids(), [Id::SubmarinerStale]);
    bench.take(gateway_of(&["10.246.0.0/16", "10.97.0.0/16"]));
    assert!(bench.ids().is_empty());
}

#[test]
fn malformed_objects_are_named_and_a_brokers_copies_do_not_count() {
    let mut events = joined();
    events.push(gateway_of(&["10.97.0.0/16", "10.245.0.0/16"]));
    for spec in [json!(7), json!({"subnets": []}), json!({"cluster_id": "B", "subnets": []}), json!({"cluster_id": 5})]
    {
        let name = format!("odd-{}", events.len());
        events.push(Event::Endpoint(read(json!({"metadata": {"name": name}, "spec": spec}), false)));
    }
    let copy = json!({"metadata": {"name": "copy", "namespace": "submariner-k8s-broker",
        "creationTimestamp": "2026-11-21T08:00:00Z"}, "spec": {"cluster_id": "cluster-b", "subnets": ["10.9.0.0/16"]}});
    events.push(Event::Endpoint(read(copy, true)));
    let mut bench = Bench::new(events);
    assert_eq!(bench.shown(), B);
    assert_eq!(bench.ids(), [Id::SourceObject; 4]);
}

/// What happens to an object.
#[derive(Clone, Debug)]
enum Step {
    Endpoint { cluster: u8, ip: u8, subnets: u8 },
    EndpointGone { cluster: u8, ip: u8 },
    Cluster { cluster: u8, global: bool },
    ClusterGone { cluster: u8 },
    Relist,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..3u8, 0..3u8, 0..4u8).prop_map(|(cluster, ip, subnets)| Step::Endpoint { cluster, ip, subnets }),
        3 => (0..3u8, 0..3u8).prop_map(|(cluster, ip)| Step::EndpointGone { cluster, ip }),
        2 => (0..3u8, any::<bool>()).prop_map(|(cluster, global)| Step::Cluster { cluster, global }),
        1 => (0..3u8).prop_map(|cluster| Step::ClusterGone { cluster }),
        1 => Just(Step::Relist),
    ];
    prop::collection::vec(step, 0..40)
}

fn event(step: &Step) -> Option<Event> {
    let name = |cluster: u8| format!("cluster-{}", char::from(b'a' + cluster));
    let net = |cluster: u8, i: u8| format!("10.{}.0.0/16", 100 + cluster * 10 + i);
    Some(match *step {
        Step::Endpoint { cluster, ip, subnets } => {
            let nets: Vec<String> = (0..subnets).map(|i| net(cluster, i)).collect();
            let nets: Vec<&str> = nets.iter().map(String::as_str).collect();
            // Its creation follows from its address, so that an update keeps it.
            endpoint_of(&name(cluster), ip, ip, &nets)
        }
        Step::EndpointGone { cluster, ip } => endpoint_gone(&name(cluster), ip),
        Step::Cluster { cluster, global } => {
            let global = if global { json!([format!("242.{cluster}.0.0/16")]) } else { json!([]) };
            cluster_of(&name(cluster), &[&net(cluster, 0)], &[&net(cluster, 1)], global)
        }
        Step::ClusterGone { cluster } => cluster_gone(&name(cluster)),
        Step::Relist => return None,
    })
}

/// The objects that are left after the steps.
fn left(steps: &[Step]) -> Vec<Step> {
    let mut objects: BTreeMap<(u8, u8, u8), Step> = BTreeMap::new();
    for step in steps {
        match step {
            Step::Endpoint { cluster, ip, .. } => drop(objects.insert((0, *cluster, *ip), step.clone())),
            Step::Cluster { cluster, .. } => drop(objects.insert((1, *cluster, 0), step.clone())),
            Step::EndpointGone { cluster, ip } => drop(objects.remove(&(0, *cluster, *ip))),
            Step::ClusterGone { cluster } => drop(objects.remove(&(1, *cluster, 0))),
            Step::Relist => {}
        }
    }
    objects.into_values().collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happened on the way, and however often the list was read anew, in the end the same is said as by who
    /// first looks then; and on the way no cluster whose objects are there, or were until now, is left out.
    #[test]
    fn history_does_not_matter(steps in steps()) {
        let operator = || Event::Submariner(read(json!({"metadata": {"name": "s"}, "spec": {"clusterID": "cluster-a"}}), false));
        let mut bench = Bench::new(vec![operator()]);
        let mut known: BTreeSet<String> = BTreeSet::new();
        for (place, step) in steps.iter().enumerate() {
            match event(step) {
                Some(event) => bench.take(event),
                None => {
                    bench.take(Event::Endpoint(Notice::Start));
                    bench.take(Event::Cluster(Notice::Start));
                    left(&steps[..place]).iter().filter_map(event).for_each(|event| bench.take(event));
                    bench.take(Event::Cluster(Notice::Complete));
                    bench.take(Event::Endpoint(Notice::Complete));
                }
            }
            let told = bench.model.view(bench.now).clusters.unwrap();
            let now: BTreeSet<String> = told.iter().map(|told| told.name.clone()).collect();
            prop_assert!(now.is_superset(&known), "{known:?} then {now:?}");
            known = now;
        }
        bench.wait(HOLD);
        let mut fresh = Bench::new(left(&steps).iter().filter_map(event).chain([operator()]).collect());
        let (said, wanted) = (bench.shown(), fresh.shown());
        // The driver of a cluster without endpoints is known to who saw one.
        let without_mtu = |text: &str| text.replace(" 1450", "");
        prop_assert_eq!(without_mtu(&said), without_mtu(&wanted));
    }
}
