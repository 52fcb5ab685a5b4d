//! What whole-machine tests share.
//!
//! A test is a function that runs machines and returns an error, which must hold everything that a
//! person needs to see: machines are not run twice to find out. [`explain`] adds what a machine said.
//!
//! Tests run in parallel, one machine a core; `cargo test -p machine-tests -- --list` names them.

pub mod hypervisor;
pub mod sector;

use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Error, Result, anyhow};
use libtest_mimic::Trial;
use xtask::machine::{self, MachineConfig, RunOutcome};
use xtask::{report, target_directory};

/// A test of this name.
pub fn trial(name: impl Into<String>, test: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name.into(), move || test().map_err(|why| format!("{why:#}").into()))
}

/// Checks a condition of an outcome: `ensure!` with what the machine said.
///
/// # Errors
/// If the condition does not hold.
pub fn check(outcome: &RunOutcome, holds: bool, what: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(explain(outcome, anyhow!("{what}"))) }
}

/// Checks that two values are equal: `assert_eq!` with what the machine said.
///
/// # Errors
/// If they are not.
pub fn check_eq<T, U>(outcome: &RunOutcome, what: &str, found: T, expected: U) -> Result<()>
where
    T: Debug + PartialEq<U>,
    U: Debug,
{
    let wrong = || format!("{what}: found {found:?}, expected {expected:?}");
    check(outcome, found == expected, &wrong())
}

/// Adds to an error what the machine said and did.
pub fn explain(outcome: &RunOutcome, why: Error) -> Error {
    const LINES: usize = 60;
    let last = |lines: Vec<String>| {
        let left_out = lines.len().saturating_sub(LINES);
        let mark =
            if left_out > 0 { format!("({left_out} lines before)\n") } else { String::new() };
        mark + &lines[left_out..].join("\n")
    };
    let serial = last(outcome.serial.lines().map(str::to_owned).collect());
    let events = last(outcome.events.iter().map(|event| format!("{event:?}")).collect());
    let truth = last(outcome.truth.iter().map(|truth| format!("{truth:?}")).collect());
    anyhow!(
        "{why:#}\n--- end: {}\n--- serial port\n{serial}\n--- events\n{events}\n--- split locks\n{truth}\n--- table\n{}",
        outcome.exit,
        report::table(&outcome.events)
    )
}

/// A disk image of a test, removed when dropped.
#[derive(Debug)]
pub struct Disk(PathBuf);

impl Disk {
    /// A name for an image that is not there yet.
    ///
    /// # Errors
    /// If its directory cannot be made.
    pub fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = target_directory().join("machines");
        fs::create_dir_all(&directory)?;
        Ok(Self(directory.join(format!("{}-{number}.img", std::process::id()))))
    }

    /// An image with this content.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn with(content: &[u8]) -> Result<Self> {
        let disk = Self::new()?;
        fs::write(&disk.0, content)
            .with_context(|| format!("cannot write {}", disk.0.display()))?;
        Ok(disk)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // It was perhaps never made.
        let _ = fs::remove_file(&self.0);
    }
}

/// Runs a machine with this disk to its end.
///
/// # Errors
/// If it cannot be run.
pub fn run(disk: &Disk, config: MachineConfig) -> Result<RunOutcome> {
    machine::record(&MachineConfig { image: disk.0.clone(), ..config }, &mut |_| {})?.parse()
}
