//! The README says what the code says.

use crosslink_core::finding::Id;

const README: &str = include_str!("../../../README.md");

#[test]
fn the_table_of_findings_is_the_codes() {
    let table: Vec<&str> = README.lines().filter(|line| line.starts_with("| `XL-")).collect();
    let expected: Vec<String> = Id::ALL
        .iter()
        .map(|id| format!("| `{}` | {} | {} | {} |", id.as_str(), id.severity(), id.cause(), id.cure()))
        .collect();
    assert_eq!(table, expected, "the README should read:\n{}", expected.join("\n"));
}

#[test]
fn every_configuration_key_is_in_the_table() {
    for key in crosslink_core::netconf::OUR_KEYS {
        assert!(README.contains(&format!("| `{key}` | ")), "{key}");
    }
}

#[test]
fn every_named_file_exists() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for name in ["src/core", "src/kernel", "src/cni", "conflist", "tests/testkit", "src/core/cidr.rs"] {
        let shown = name.strip_prefix("tests/").map_or_else(|| name.to_owned(), |name| format!("{name}/"));
        assert!(README.contains(&shown), "{shown} is in the README");
        std::fs::metadata(root.join(name)).expect(name);
    }
}
