//! The node agent of crosslink. It puts the plugin and its conflist entry on the node and keeps them there, keeps the
//! remotes files in sync with what the cluster knows, brings changes to pods that are already running, and keeps the
//! rules that underlay traffic needs.
//!
//! Each part is a module with a `run(Context)`; parts meet only in files of the node-local contract (`remotes/`,
//! `node.json`, records) and on the [`board::Board`]. [`app`] alone wires them.

pub mod api;
pub mod app;
pub mod args;
pub mod backoff;
pub mod board;
pub mod context;
mod dirs;
pub mod facts;
pub mod inputs;
pub mod install;
mod kube_error;
mod logging;
pub mod resync;
pub mod settings;
pub mod source;
pub mod surface;
pub mod traffic;
