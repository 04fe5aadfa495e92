//! Reading a list and keeping the place of every plugin in the text.

use std::{fmt, ops::Range};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::TYPE;

/// An object's keys and values as they were written, in order, duplicates too.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry::<String, &'de RawValue>()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}

impl<'a> Members<'a> {
    fn parse(text: &'a str) -> Result<Self, String> {
        serde_json::from_str(text).map_err(|err| err.to_string())
    }

    /// The value of a key. The last one counts where there are several, as in Go's `encoding/json`.
    fn get(&self, key: &str) -> Option<&'a RawValue> {
        self.0.iter().rev().find(|(name, _)| name == key).map(|(_, value)| *value)
    }

    /// The same, in any case: Go matches the fields of a struct so.
    fn get_folded(&self, key: &str) -> Option<&'a RawValue> {
        self.0.iter().rev().find(|(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, value)| *value)
    }

    fn string(&self, key: &str) -> Result<Option<String>, String> {
        self.get(key).map(|raw| string(key, raw)).transpose()
    }
}

fn string(key: &str, raw: &RawValue) -> Result<String, String> {
    serde_json::from_str(raw.get()).map_err(|_| format!("\"{key}\" is no string"))
}

/// One plugin of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plugin<'a> {
    /// Its `type`.
    pub kind: String,
    /// Its object as written.
    pub raw: &'a str,
    /// Where that is in the list's text, in bytes.
    pub span: Range<usize>,
}

impl Plugin<'_> {
    /// Whether it is ours.
    pub fn is_ours(&self) -> bool {
        self.kind == TYPE
    }
}

/// A network configuration list (`.conflist`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List<'a> {
    /// All of the text.
    pub text: &'a str,
    /// The network's name.
    pub name: String,
    /// Whether libcni 1.3 is told not to append what is in the directory named like the network.
    pub inlined_only: bool,
    /// Plugins in the order of the chain; at least one.
    pub plugins: Vec<Plugin<'a>>,
}

impl<'a> List<'a> {
    /// Reads a list by libcni's rules.
    ///
    /// # Errors
    /// In words, why libcni would refuse it.
    pub fn parse(text: &'a str) -> Result<Self, String> {
        let members = Members::parse(text)?;
        let name = members.string("name")?.ok_or("it has no \"name\"")?;
        members.string("cniVersion")?;
        let raw = members.get("plugins").ok_or("it has no \"plugins\"")?;
        let raw: Vec<&'a RawValue> =
            serde_json::from_str(raw.get()).map_err(|_| "\"plugins\" is no list".to_owned())?;
        let plugins: Vec<Plugin<'a>> =
            raw.iter().enumerate().map(|(index, raw)| plugin(text, index, raw)).collect::<Result<_, _>>()?;
        if plugins.is_empty() {
            return Err("\"plugins\" is empty".to_owned());
        }
        let inlined_only = members.get("loadOnlyInlinedPlugins").is_some_and(|raw| raw.get() == "true");
        Ok(Self { text, name, inlined_only, plugins })
    }

    /// Types of its plugins.
    pub fn kinds(&self) -> impl Iterator<Item = &str> {
        self.plugins.iter().map(|plugin| plugin.kind.as_str())
    }

    /// Whether an entry of ours is in it.
    pub fn has_ours(&self) -> bool {
        self.plugins.iter().any(Plugin::is_ours)
    }
}

fn plugin<'a>(text: &'a str, index: usize, raw: &'a RawValue) -> Result<Plugin<'a>, String> {
    let named = |why: String| format!("plugin {}: {why}", index + 1);
    let kind = kind_of(&Members::parse(raw.get()).map_err(named)?).map_err(named)?;
    let raw = raw.get();
    // Raw values are parts of the text that they were read from.
    let start = (raw.as_ptr() as usize).wrapping_sub(text.as_ptr() as usize);
    let span = start..start.saturating_add(raw.len());
    if text.get(span.clone()) != Some(raw) {
        return Err(named("its place in the text is not known".to_owned()));
    }
    Ok(Plugin { kind, raw, span })
}

fn kind_of(members: &Members<'_>) -> Result<String, String> {
    let raw = members.get_folded("type").ok_or("it has no \"type\"")?;
    let kind = string("type", raw)?;
    if kind.is_empty() { Err("its \"type\" is empty".to_owned()) } else { Ok(kind) }
}

/// A configuration of a single plugin (`.conf`, `.json`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Single<'a> {
    /// All of the text.
    pub text: &'a str,
    /// The network's name as written, quotes included; libcni takes a missing one for an empty one.
    pub name: Option<&'a str>,
    /// `cniVersion` as written.
    pub version: Option<&'a str>,
    /// The plugin's `type`.
    pub kind: String,
}

impl<'a> Single<'a> {
    /// Reads it by libcni's rules.
    ///
    /// # Errors
    /// In words, why libcni would refuse it.
    pub fn parse(text: &'a str) -> Result<Self, String> {
        let members = Members::parse(text)?;
        let kind = kind_of(&members)?;
        members.string("name")?;
        members.string("cniVersion")?;
        let raw = |key| members.get(key).map(RawValue::get);
        Ok(Self { text, name: raw("name"), version: raw("cniVersion"), kind })
    }
}

/// A member of an object, as text; none where the text is no object or has no such key.
pub(super) fn member<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    Members::parse(text).ok()?.get(key).map(RawValue::get)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_those_of_the_text() {
        let text = "\n {\"name\" : \"n\", \"plugins\":[ {\"type\":\"a\"} ,\t{\"Type\":\"b\", \"x\":[1e400]}]}";
        let list = List::parse(text).unwrap();
        let raws: Vec<&str> = list.plugins.iter().map(|plugin| &text[plugin.span.clone()]).collect();
        assert_eq!(raws, ["{\"type\":\"a\"}", "{\"Type\":\"b\", \"x\":[1e400]}"]);
        assert_eq!(list.kinds().collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn the_last_of_equal_keys_counts() {
        let text = r#"{"name":"a","name":"b","plugins":7,"plugins":[{"type":"x","type":"y"}]}"#;
        let list = List::parse(text).unwrap();
        assert_eq!((list.name.as_str(), list.plugins[0].kind.as_str()), ("b", "y"));
    }

    #[test]
    fn what_libcni_refuses_is_refused() {
        for (text, why) in [
            ("", "EOF"),
            ("{", "EOF"),
            ("[]", "object"),
            ("{}", "no \"name\""),
            (r#"{"name":7,"plugins":[{"type":"a"}]}"#, "\"name\" is no string"),
            (r#"{"name":"n","cniVersion":null,"plugins":[{"type":"a"}]}"#, "\"cniVersion\" is no string"),
            (r#"{"name":"n"}"#, "no \"plugins\""),
            (r#"{"name":"n","plugins":{}}"#, "no list"),
            (r#"{"name":"n","plugins":[]}"#, "empty"),
            (r#"{"name":"n","plugins":[{"type":"a"},{}]}"#, "plugin 2: it has no \"type\""),
            (r#"{"name":"n","plugins":[{"type":""}]}"#, "plugin 1: its \"type\" is empty"),
            (r#"{"name":"n","plugins":[null]}"#, "plugin 1"),
            (r#"{"name":"n","plugins":[{"type":"a"}]} x"#, "trailing"),
        ] {
            let err = List::parse(text).unwrap_err();
            assert!(err.contains(why), "{text}: {err}");
        }
    }

    #[test]
    fn single_plugins() {
        let single = Single::parse(r#"{"type":"bridge","name":"é","cniVersion":"0.3.1"}"#).unwrap();
        assert_eq!((single.name, single.version), (Some("\"é\""), Some("\"0.3.1\"")));
        assert!(Single::parse(r#"{"name":"n","plugins":[{"type":"a"}]}"#).is_err());
    }
}
