//! Part: what is shown.

use tokio::sync::mpsc;

use crate::{board::Note, context::Context};

/// Runs the part.
///
/// # Errors
/// It cannot go on.
pub async fn run(context: Context, mut notes: mpsc::Receiver<Note>) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            () = context.stop.cancelled() => return Ok(()),
            note = notes.recv() => if note.is_none() { return Ok(()) },
        }
    }
}
