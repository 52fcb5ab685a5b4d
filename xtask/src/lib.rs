//! Everything around the hypervisor: building it, making its disk, fetching and running the machines,
//! reading what they say, checking it against the ground truth.
//!
//! `cargo xtask` is a thin command line over this library; the whole-machine tests use it directly.

use std::env;
use std::path::PathBuf;

pub mod bare;
pub mod bench;
pub mod bochs;
pub mod cache;
pub mod config;
pub mod console;
pub mod doctor;
pub mod events;
pub mod firmware;
pub mod flash;
pub mod guests;
pub mod image;
pub mod link;
pub mod links;
pub mod linux;
pub mod machine;
pub mod monitor;
pub mod nested;
pub mod offenders;
pub mod page;
pub mod pe;
pub mod peer;
pub mod profile;
pub mod qemu;
pub mod report;
pub mod run;
pub mod screen;
pub mod shim;
pub mod stick;
pub mod stress;
pub mod suite;
pub mod symbols;
pub mod system;
mod terminal;
pub mod timeline;
pub mod topology;
pub mod trace;
pub mod truth;

/// Cargo's target directory: where everything goes that can be made again.
pub fn target_directory() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| bare::root().join("target"), PathBuf::from)
}
