//! Objects of one kind as the API server lists and then changes them.

use std::collections::BTreeMap;

use super::{
    feed::Notice,
    object::{Key, Object},
};

/// Objects of one kind, each reduced to what its source needs. Until a new list is complete, objects of the one before
/// stay.
#[derive(Clone, Debug)]
pub struct Table<T> {
    rows: BTreeMap<Key, (bool, T)>,
    complete: bool,
    failure: Option<String>,
    listing: bool,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { rows: BTreeMap::new(), complete: false, failure: None, listing: false }
    }
}

impl<T> Table<T> {
    /// Takes a notice. True where an object was deleted on a live watch.
    pub fn take<B>(&mut self, notice: Notice<B>, reduce: impl FnOnce(Object<B>) -> T) -> bool {
        match notice {
            Notice::Start => {
                self.listing = true;
                self.rows.values_mut().for_each(|(seen, _)| *seen = false);
            }
            Notice::Seen(object) => {
                self.failure = None;
                self.rows.insert(object.key(), (true, reduce(*object)));
            }
            Notice::Gone(key) => {
                self.failure = None;
                return self.rows.remove(&key).is_some();
            }
            Notice::Complete => {
                if self.listing {
                    self.rows.retain(|_, (seen, _)| *seen);
                }
                self.listing = false;
                self.complete = true;
                self.failure = None;
            }
            Notice::Absent => {
                self.rows.clear();
                self.complete = true;
                self.failure = None;
            }
            Notice::Failed(why) => self.failure = Some(why),
        }
        false
    }

    /// Objects in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &T)> {
        self.rows.iter().map(|(key, (_, row))| (key, row))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether what is there can be relied on.
    pub const fn complete(&self) -> bool {
        self.complete
    }

    /// Why the kind cannot be read now.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    use super::*;

    fn object(name: &str) -> Notice<()> {
        let meta = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        Notice::Seen(Box::new(Object { meta, body: Ok(()) }))
    }

    fn names(table: &Table<()>) -> String {
        table.iter().map(|((_, name), ())| name.as_str()).collect()
    }

    #[test]
    fn a_new_list_replaces_the_old_one_when_it_is_complete() {
        let mut table = Table::default();
        let take = |table: &mut Table<()>, notice| table.take(notice, |_| ());
        for notice in [Notice::Start, object("a"), object("b")] {
            take(&mut table, notice);
        }
        assert!(!table.complete());
        take(&mut table, Notice::Complete);
        assert_eq!(names(&table), "ab");
        take(&mut table, Notice::Failed("no".into()));
        assert_eq!(table.failure(), Some("no"));
        for notice in [Notice::Start, object("b"), object("c")] {
            take(&mut table, notice);
            assert!(names(&table).starts_with("ab"));
        }
        take(&mut table, Notice::Complete);
        assert_eq!((names(&table).as_str(), table.failure()), ("bc", None));
        assert!(take(&mut table, Notice::Gone((String::new(), "b".into()))));
        take(&mut table, Notice::Absent);
        assert_eq!((names(&table).as_str(), table.complete()), ("", true));
    }
}
