//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::settings::Given;

/// Installs the crosslink CNI plugin on this node and keeps plugin, remotes files and running pods in step.
#[derive(Debug, Parser)]
#[command(name = "crosslink-agent", version, args_override_self = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Settings file (YAML or JSON); environment and flags win over it
    #[arg(long, env = "CROSSLINK_CONFIG", global = true)]
    pub config: Option<PathBuf>,
    /// Settings by flag and environment.
    #[command(flatten)]
    pub given: Given,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Run on this node until a signal comes
    Run,
    /// Take the plugin out of the chain and remove what the agent keeps on this node; the binary stays, for DEL
    Uninstall,
    /// Print the CustomResourceDefinitions as YAML
    Crds,
    /// Print the effective settings as JSON, or what is wrong with them
    Settings,
}
