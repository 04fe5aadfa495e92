//! Edits of arbitrary lists: what is not ours stays to the byte, whatever it is and however it is laid out.
#![expect(clippy::unwrap_used, reason = "a test")]

use crosslink_core::conflist::{Constraints, List, insert, remove, valid};
use proptest::prelude::*;
use serde_json::Value;

const ENTRY: &str = r#"{"type":"crosslink","capabilities":{"io.kubernetes.cri.pod-annotations":true},"vethMTU":1400}"#;
const OTHER_ENTRY: &str = r#"{ "type" : "crosslink" , "hijack" : [ "b" ] }"#;

/// Types that occur in constraints, beside ones that do not.
const KINDS: [&str; 8] = ["ptp", "portmap", "tuning", "istio-cni", "linkerd-cni", "cilium-cni", "x", "a\\u0062c"];

fn space() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec![" ", "\t", "\n", "\r\n", "\n    "]), 0..3).prop_map(|v| v.concat())
}

fn scalar() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(vec![
            "null",
            "true",
            "false",
            "0",
            "-0",
            "1.0",
            "1.50",
            "1e400",
            "-1E-400",
            "12345678901234567890",
            "0.1e+7",
            "100000000000000000000000000000000000000000000.000",
            r#""\ud83d\ude00""#,
            r#""\/\u0000\b""#,
            r#""é😀""#,
            r#""{\"type\":\"crosslink\"}""#,
            r#""],[""#,
        ])
        .prop_map(str::to_owned),
        any::<f64>().prop_filter("a number", |f| f.is_finite()).prop_map(|f| format!("{f:?}")),
        any::<String>().prop_map(|text| Value::from(text).to_string()),
    ]
}

fn key() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(vec!["ipam", "args", "a", "ß", "plugins ", "capabilities"])
            .prop_map(|key| Value::from(key).to_string()),
        any::<String>()
            .prop_filter("not a key with a meaning", |key| {
                !["name", "plugins", "cniVersion", "loadOnlyInlinedPlugins"].contains(&key.as_str())
                    && !key.eq_ignore_ascii_case("type")
            })
            .prop_map(|key| Value::from(key).to_string()),
    ]
}

/// `open item , item close`, with white space wherever JSON allows it.
fn sequence(open: &'static str, items: Vec<String>, spaces: &[String], close: &'static str) -> String {
    let space = |index: usize| spaces.get(index % spaces.len().max(1)).cloned().unwrap_or_default();
    let spaced: Vec<String> =
        items.iter().enumerate().map(|(i, item)| format!("{}{item}{}", space(i), space(i + 1))).collect();
    let inner = if spaced.is_empty() { space(0) } else { spaced.join(",") };
    format!("{open}{inner}{close}")
}

fn spaces() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(space(), 1..5)
}

fn value() -> impl Strategy<Value = String> {
    scalar().prop_recursive(4, 24, 5, |inner| {
        prop_oneof![
            (prop::collection::vec(inner.clone(), 0..4), spaces())
                .prop_map(|(items, spaces)| sequence("[", items, &spaces, "]")),
            (prop::collection::vec((key(), inner), 0..4), spaces())
                .prop_map(|(members, spaces)| object(members, &spaces)),
        ]
    })
}

fn object(members: Vec<(String, String)>, spaces: &[String]) -> String {
    let colon = spaces.first().cloned().unwrap_or_default();
    let members = members.into_iter().map(|(key, value)| format!("{key}{colon}:{colon}{value}")).collect();
    sequence("{", members, spaces, "}")
}

/// An object with members that matter, somewhere among others.
fn with_members(required: Vec<(String, String)>) -> impl Strategy<Value = String> {
    (prop::collection::vec((key(), value()), 0..4), spaces(), any::<u64>()).prop_map(
        move |(mut members, spaces, seed)| {
            for (index, member) in required.iter().enumerate() {
                let place = usize::try_from(seed >> (8 * index)).unwrap_or(0) % (members.len() + 1);
                members.insert(place, member.clone());
            }
            object(members, &spaces)
        },
    )
}

fn plugin() -> impl Strategy<Value = String> {
    prop::sample::select(KINDS.to_vec())
        .prop_flat_map(|kind| with_members(vec![("\"type\"".to_owned(), format!("\"{kind}\""))]))
}

/// A list without an entry of ours.
fn list() -> impl Strategy<Value = String> {
    (prop::collection::vec(plugin(), 1..6), spaces(), space(), space()).prop_flat_map(
        |(plugins, spaces, head, tail)| {
            let plugins = sequence("[", plugins, &spaces, "]");
            let required = vec![
                ("\"name\"".to_owned(), "\"n\"".to_owned()),
                ("\"plug\\u0069ns\"".to_owned(), plugins),
                ("\"cniVersion\"".to_owned(), "\"1.0.0\"".to_owned()),
            ];
            with_members(required).prop_map(move |text| format!("{head}{text}{tail}"))
        },
    )
}

fn constraints() -> impl Strategy<Value = Constraints> {
    let kinds = || prop::collection::vec(prop::sample::select(KINDS.to_vec()).prop_map(str::to_owned), 0..3);
    (kinds(), kinds()).prop_map(|(after, before)| Constraints { after, before })
}

fn edit(text: &str, entry: &str, constraints: &Constraints) -> Option<String> {
    insert(&List::parse(text).unwrap(), entry, constraints).ok()
}

fn without(text: &str) -> String {
    remove(&List::parse(text).unwrap()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_put_in_can_be_taken_out(text in list(), constraints in constraints()) {
        prop_assert_eq!(without(&text), text.as_str());
        let Some(edited) = edit(&text, ENTRY, &constraints) else { return Ok(()) };
        let list = List::parse(&edited).unwrap();
        prop_assert!(valid(&list, ENTRY, &constraints));
        prop_assert_eq!(list.plugins.iter().filter(|plugin| plugin.is_ours()).count(), 1);
        prop_assert_eq!(without(&edited), text.as_str(), "taken out of {}", edited);
        prop_assert_eq!(edit(&edited, ENTRY, &constraints).unwrap(), edited, "idempotent");
    }

    #[test]
    fn others_are_passed_on_to_the_byte(text in list(), constraints in constraints()) {
        let before = List::parse(&text).unwrap();
        let Some(edited) = edit(&text, ENTRY, &constraints) else { return Ok(()) };
        let after = List::parse(&edited).unwrap();
        let others: Vec<&str> = after.plugins.iter().filter(|plugin| !plugin.is_ours()).map(|plugin| plugin.raw).collect();
        prop_assert_eq!(others, before.plugins.iter().map(|plugin| plugin.raw).collect::<Vec<_>>());
        // One piece was added and nothing else: some head and the tail that is left of it are the old text.
        let (old, new) = (text.as_bytes(), edited.as_bytes());
        let head = old.iter().zip(new).take_while(|(a, b)| a == b).count();
        prop_assert!(new.len() > old.len() && (0..=head).any(|cut| new.ends_with(&old[cut..])), "{}", edited);
    }

    #[test]
    fn another_entry_is_replaced_wherever_it_is(text in list(), constraints in constraints(), places in prop::collection::vec(0usize..6, 1..3)) {
        let Some(expected) = edit(&text, ENTRY, &constraints) else { return Ok(()) };
        let mut messy = text.clone();
        for place in places {
            let list = List::parse(&messy).unwrap();
            let plugin = list.plugins[place % list.plugins.len()].clone();
            messy.replace_range(plugin.span.start..plugin.span.start, &format!("{OTHER_ENTRY} , "));
        }
        let edited = edit(&messy, ENTRY, &constraints).unwrap();
        prop_assert!(valid(&List::parse(&edited).unwrap(), ENTRY, &constraints));
        let others = |text: &str| -> Vec<String> {
            List::parse(text).unwrap().plugins.iter().filter(|p| !p.is_ours()).map(|p| p.raw.to_owned()).collect()
        };
        prop_assert_eq!(others(&edited), others(&expected));
    }

    #[test]
    fn any_text_is_refused_or_edited_without_panic(text in any::<String>(), cut in 0usize..4000, list in list()) {
        drop(List::parse(&text).map(|list| insert(&list, ENTRY, &Constraints::default())));
        // Half a list, as while a writer truncates and writes, never passes for a whole one.
        let end = (0..=cut.min(list.len())).rev().find(|end| list.is_char_boundary(*end)).unwrap_or(0);
        if end < list.trim_end().len() {
            prop_assert!(List::parse(&list[..end]).is_err());
        }
    }
}
