//! Putting the entry in and taking it out.

use serde_json::Value;

use super::parse::{List, Single};

/// Plugins that a chained plugin follows by custom, where they are in the chain.
const USUALLY_BEFORE: [&str; 4] = ["portmap", "bandwidth", "tuning", "firewall"];

/// Where in the chain the entry may be. It is never first: the first plugin makes the interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Constraints {
    /// Types that must come before.
    pub after: Vec<String>,
    /// Types that must come after.
    pub before: Vec<String>,
}

/// Places for the entry, counted in plugins of others: it may stand behind that many of them.
struct Places {
    least: usize,
    most: usize,
}

impl Constraints {
    /// The places in a chain of these types, ours left out. What is configured wins over what is usual, and the usual
    /// plugins count only as far as they stand in front of what must come after.
    fn places(&self, kinds: &[&str]) -> Result<Places, String> {
        let named = |list: &[String], kind: &str| list.iter().any(|name| name == kind);
        let most = kinds.iter().position(|kind| named(&self.before, kind)).unwrap_or(kinds.len());
        let hard = kinds.iter().rposition(|kind| named(&self.after, kind)).map_or(1, |index| index + 1);
        if most < hard {
            let before = kinds.get(most).copied().unwrap_or_default();
            let after = kinds.get(hard - 1).copied().unwrap_or_default();
            return Err(if before == after || hard == 1 {
                format!(
                    "the first plugin, {before}, makes the interface, so crosslink cannot come before it: take it out of cniInsertBefore"
                )
            } else {
                format!(
                    "{before} stands before {after} in the chain, so crosslink cannot be before the one and after the other: change cniInsertBefore or cniInsertAfter"
                )
            });
        }
        let front = kinds.get(..most).unwrap_or_default();
        let soft = front.iter().rposition(|kind| USUALLY_BEFORE.contains(kind)).map_or(0, |index| index + 1);
        Ok(Places { least: hard.max(soft), most })
    }
}

/// Whether two entries mean the same.
pub fn same(a: &str, b: &str) -> bool {
    let parsed = |text| serde_json::from_str::<Value>(text).ok();
    a == b || parsed(a).is_some_and(|a| Some(a) == parsed(b))
}

/// Whether the list has the entry once, with the same meaning, at a place that the constraints allow. It need not be
/// last, nor at any one place: another agent that insists on a place of its own must not start a fight.
pub fn valid(list: &List<'_>, entry: &str, constraints: &Constraints) -> bool {
    let ours: Vec<usize> = positions(list);
    let [place] = ours.as_slice() else { return false };
    let others: Vec<&str> = others(list);
    let right_place = constraints.places(&others).is_ok_and(|places| (places.least..=places.most).contains(place));
    right_place && list.plugins.get(*place).is_some_and(|plugin| same(plugin.raw, entry))
}

fn positions(list: &List<'_>) -> Vec<usize> {
    let ours = list.plugins.iter().enumerate().filter(|(_, plugin)| plugin.is_ours());
    ours.map(|(index, _)| index).collect()
}

fn others<'l>(list: &'l List<'_>) -> Vec<&'l str> {
    list.plugins.iter().filter(|plugin| !plugin.is_ours()).map(|plugin| plugin.kind.as_str()).collect()
}

/// The list's text with the entry in it, once, at a place that the constraints allow; the text itself where that is so.
/// Nothing else changes, not a space.
///
/// # Errors
/// In words: the list is ours alone, or no place suits.
pub fn insert(list: &List<'_>, entry: &str, constraints: &Constraints) -> Result<String, String> {
    if valid(list, entry, constraints) {
        return Ok(list.text.to_owned());
    }
    let others = others(list);
    if others.is_empty() {
        return Err("it has no plugin but crosslink".to_owned());
    }
    let places = constraints.places(&others)?;
    if let [place] = positions(list).as_slice()
        && (places.least..=places.most).contains(place)
        && let Some(plugin) = list.plugins.get(*place)
    {
        return splice(list.text, plugin.span.start, plugin.span.end, entry);
    }
    let bare = remove(list)?;
    let list = List::parse(&bare)?;
    let index = places.most.checked_sub(1).ok_or("there is no place for it")?;
    let previous = list.plugins.get(index).ok_or("there is no place for it")?;
    let lead = format!(",{}", white_space_before(list.text, previous.span.start));
    splice(list.text, previous.span.end, previous.span.end, &format!("{lead}{entry}"))
}

/// The white space in front of a place: a new line and its indentation, mostly.
fn white_space_before(text: &str, end: usize) -> &str {
    let before = text.get(..end).unwrap_or_default();
    let length = before.len() - before.trim_end_matches([' ', '\t', '\n', '\r']).len();
    before.get(before.len() - length..).unwrap_or_default()
}

fn splice(text: &str, start: usize, end: usize, new: &str) -> Result<String, String> {
    match (text.get(..start), text.get(end..)) {
        (Some(head), Some(tail)) => Ok(format!("{head}{new}{tail}")),
        _ => Err("a place in it is not known".to_owned()),
    }
}

/// The list's text without any entry of ours; undoes [`insert`] to the byte.
///
/// # Errors
/// In words: nothing would be left.
pub fn remove(list: &List<'_>) -> Result<String, String> {
    let Some(first_other) = list.plugins.iter().position(|plugin| !plugin.is_ours()) else {
        return Err("it has no plugin but crosslink".to_owned());
    };
    // An entry goes with what separates it from the plugin before it; one that is first, with what separates it from the
    // first that stays.
    let mut cuts = Vec::new();
    if let (Some(first), Some(other)) = (list.plugins.first(), list.plugins.get(first_other))
        && first_other > 0
    {
        cuts.push(first.span.start..other.span.start);
    }
    let pairs = list.plugins.iter().zip(list.plugins.iter().skip(1)).skip(first_other);
    cuts.extend(pairs.filter(|(_, plugin)| plugin.is_ours()).map(|(before, plugin)| before.span.end..plugin.span.end));
    let mut text = String::with_capacity(list.text.len());
    let mut kept = 0;
    for cut in cuts {
        text.push_str(list.text.get(kept..cut.start).unwrap_or_default());
        kept = cut.end;
    }
    text.push_str(list.text.get(kept..).unwrap_or_default());
    Ok(text)
}

/// A list of a single plugin's configuration and the entry, under its name and version.
///
/// # Errors
/// In words: the configuration has no name.
pub fn convert(single: &Single<'_>, entry: &str) -> Result<String, String> {
    let name = single.name.ok_or("it has no \"name\", which a list must have")?;
    let version = single.version.map(|version| format!("  \"cniVersion\": {version},\n")).unwrap_or_default();
    let plugin = single.text.trim();
    Ok(format!("{{\n{version}  \"name\": {name},\n  \"plugins\": [\n    {plugin},\n    {entry}\n  ]\n}}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: &str = r#"{"type":"crosslink","vethMTU":1400}"#;

    fn chain(kinds: &[&str]) -> String {
        let plugins: Vec<String> = kinds.iter().map(|kind| format!("{{\"type\":\"{kind}\"}}")).collect();
        format!("{{\"name\":\"n\",\"plugins\":[{}]}}", plugins.join(","))
    }

    fn rules(after: &[&str], before: &[&str]) -> Constraints {
        let owned = |list: &[&str]| list.iter().map(|kind| (*kind).to_owned()).collect();
        Constraints { after: owned(after), before: owned(before) }
    }

    fn order(kinds: &[&str], rules: &Constraints) -> Result<String, String> {
        let text = chain(kinds);
        let edited = insert(&List::parse(&text)?, ENTRY, rules)?;
        let list = List::parse(&edited)?;
        assert!(valid(&list, ENTRY, rules));
        Ok(list.kinds().collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn places() {
        let none = Constraints::default();
        let cases: [(&[&str], &Constraints, &str); 9] = [
            (&["ptp"], &none, "ptp crosslink"),
            (&["ptp", "portmap", "istio-cni"], &none, "ptp portmap istio-cni crosslink"),
            (&["ptp", "portmap", "istio-cni"], &rules(&[], &["istio-cni"]), "ptp portmap crosslink istio-cni"),
            (&["ptp", "istio-cni", "portmap"], &rules(&[], &["istio-cni"]), "ptp crosslink istio-cni portmap"),
            (&["ptp", "portmap"], &rules(&["istio-cni"], &["linkerd-cni"]), "ptp portmap crosslink"),
            (&["ptp", "a", "b"], &rules(&["a"], &["b"]), "ptp a crosslink b"),
            (&["ptp", "b", "portmap"], &rules(&[], &["portmap"]), "ptp b crosslink portmap"),
            (&["crosslink", "ptp", "portmap"], &none, "ptp portmap crosslink"),
            (&["ptp", "crosslink", "portmap", "crosslink", "x"], &none, "ptp portmap x crosslink"),
        ];
        for (kinds, rules, expected) in cases {
            assert_eq!(order(kinds, rules).unwrap(), expected);
        }
        for (kinds, rules, part) in [
            (&["ptp", "b", "a"][..], rules(&["a"], &["b"]), "b stands before a"),
            (&["ptp", "a"], rules(&[], &["ptp"]), "take it out of cniInsertBefore"),
            (&["crosslink"], none, "no plugin but crosslink"),
        ] {
            let why = order(kinds, &rules).unwrap_err();
            assert!(why.contains(part), "{why}");
        }
    }

    #[test]
    fn a_place_that_suits_is_kept() {
        let text = r#"{"name":"n","plugins":[{"type":"ptp"}, {"type":"crosslink", "old":1} ,{"type":"last"}]}"#;
        let list = List::parse(text).unwrap();
        assert!(!valid(&list, ENTRY, &Constraints::default()));
        let edited = insert(&list, ENTRY, &Constraints::default()).unwrap();
        assert_eq!(edited, text.replace(r#"{"type":"crosslink", "old":1}"#, ENTRY));
        let spaced = edited.replace(ENTRY, r#"{ "vethMTU": 1400, "type": "crosslink" }"#);
        assert_eq!(insert(&List::parse(&spaced).unwrap(), ENTRY, &Constraints::default()).unwrap(), spaced);
    }

    #[test]
    fn layout_is_followed_and_left_again() {
        let text = "{\n  \"name\": \"n\",\n  \"plugins\": [\n    {\n      \"type\": \"ptp\"\n    }\n  ]\n}\n";
        let list = List::parse(text).unwrap();
        let edited = insert(&list, ENTRY, &Constraints::default()).unwrap();
        assert!(edited.contains(&format!("    }},\n    {ENTRY}\n  ]\n")), "{edited}");
        assert_eq!(remove(&List::parse(&edited).unwrap()).unwrap(), text);
        assert_eq!(remove(&list).unwrap(), text);
    }

    #[test]
    fn a_single_plugin_becomes_a_list_of_its_name() {
        let text = "{ \"cniVersion\": \"0.3.1\", \"name\": \"mynet\",\n \"type\": \"bridge\", \"mtu\": 1.50e3 }\n";
        let list = convert(&Single::parse(text).unwrap(), ENTRY).unwrap();
        let list = List::parse(&list).unwrap();
        assert_eq!((list.name.as_str(), list.kinds().collect::<Vec<_>>()), ("mynet", vec!["bridge", "crosslink"]));
        assert_eq!(list.plugins[0].raw, text.trim());
        assert!(list.text.contains("\"cniVersion\": \"0.3.1\""));
        assert!(convert(&Single::parse(r#"{"type":"bridge"}"#).unwrap(), ENTRY).is_err());
    }
}
