//! Builds the split-lock shim, a library for this host that is loaded into Bochs.

use std::env;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, ensure};

use crate::bare::root;
use crate::{console, target_directory};

/// Builds it, once in this process, and returns the library.
///
/// # Errors
/// If cargo fails.
pub fn build() -> Result<PathBuf> {
    static BUILT: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(library) = &*built {
        return Ok(library.clone());
    }
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(["build", "--release", "--package", "sld-shim"]);
    console::run(&mut command)?;
    let library = target_directory().join("release/libsld_shim.so");
    ensure!(library.exists(), "cargo did not make {}", library.display());
    Ok(built.insert(library).clone())
}
