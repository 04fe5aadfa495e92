//! GC: removes what attachments of this network left that the runtime does not list. Whatever is in a sandbox goes with
//! it; ours are the record and a link that survived.

use std::collections::BTreeSet;

use crosslink_core::{
    error::{Code, Error, quoted},
    finding::{Finding, Id},
    json::Object,
    netconf::{self, RawConf, Strictness},
};
use crosslink_kernel::{
    attachment::{collect, is_alive},
    records::Records,
};
use serde::Deserialize;

use crate::{Open, call::Call, logging};

/// The key of the specification, and the one that older libcni writes beside it.
const KEYS: [&str; 2] = ["cni.dev/valid-attachments", "cni.dev/attachments"];

#[derive(Deserialize)]
struct Valid {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

/// Carries out GC.
///
/// # Errors
/// Code 7 where the list cannot be read, code 5 with everything that could not be removed.
pub fn gc(call: &Call<'_>, open: Open<'_>) -> Result<(), Error> {
    let (conf, mut findings) = netconf::parse(&call.raw, Strictness::Lenient)?;
    logging::configure(&conf);
    // `cnitool gc` gives no key: that says nothing about what is valid.
    let Some(valid) = valid_attachments(&call.raw)? else {
        log::info!("no list of valid attachments: nothing to do");
        return Ok(());
    };
    if conf.name.is_empty() {
        return Err(Error::config(
            "the configuration has no network \"name\", so no attachment is known to be its own",
        ));
    }
    let records = Records::new(&conf.state_dir);
    let mut kernel = open()?;
    let (mut failures, mut removed) = (Vec::new(), 0);
    for record in records.all() {
        match record {
            Err(why) => findings.push(Finding::new(Id::State, why)),
            Ok(record) if record.network != conf.name => {}
            Ok(record) if valid.contains(&(record.container_id.clone(), record.ifname.clone())) => {}
            Ok(record) if is_alive(&record, kernel.as_mut())? => {
                let text = format!("{} {} in {}", record.container_id, record.ifname, record.netns.path.display());
                findings.push(Finding::new(Id::GcAlive, text));
            }
            Ok(record) => match collect(&record, &records, kernel.as_mut()) {
                Ok(()) => removed += 1,
                Err(err) => failures.push(err.to_string()),
            },
        }
    }
    logging::findings(&findings);
    log::info!("done: {removed} attachments removed");
    if failures.is_empty() {
        return Ok(());
    }
    Err(Error::new(Code::Io, format!("{} attachments could not be removed", failures.len()))
        .with_details(failures.join("\n")))
}

/// The attachments that the runtime knows; none where it gives no list. `null` and `[]` say that there are none.
fn valid_attachments(raw: &RawConf<'_>) -> Result<Option<BTreeSet<(String, String)>>, Error> {
    let Some(list) = KEYS.iter().find_map(|key| raw.raw(key)) else { return Ok(None) };
    let bad = |err: serde_json::Error| {
        Error::config(format!("{} is {}: {err}; give a list of {{containerID, ifname}}", KEYS[0], quoted(list.get())))
    };
    let list: Option<Vec<Object<Valid>>> = serde_json::from_str(list.get()).map_err(bad)?;
    Ok(Some(list.unwrap_or_default().into_iter().map(|Object(valid)| (valid.container_id, valid.ifname)).collect()))
}
