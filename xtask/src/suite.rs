//! `cargo xtask test`: everything, in order, until something fails.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::bare::root;
use crate::bochs::Bochs;
use crate::console::{self, section};
use crate::qemu::Qemu;
use crate::shim;
use crate::system::System;
use crate::target_directory;

/// Numbers of a test program's closing line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u32,
    failed: u32,
}

/// Runs all checks and tests; with a filter only the tests whose names contain it, and none of all interleavings.
///
/// # Errors
/// If anything failed.
pub fn run(filter: Option<&str>) -> Result<()> {
    let mut total = Count::default();
    let result = sections(filter, &mut total);
    println!("\n{} passed, {} failed", total.passed, total.failed);
    result
}

fn sections(filter: Option<&str>, total: &mut Count) -> Result<()> {
    if filter.is_none() {
        section("Format");
        console::run(cargo().args(["fmt", "--all", "--check"]))?;
        section("Lints");
        // Apart, since what is built together shares its dependencies' features, and what runs on
        // the bare machine has no `std`.
        let bare = ["hv-kernel", "boot", "guests", "linux-init"];
        let host: Vec<_> = bare.into_iter().flat_map(|package| ["--exclude", package]).collect();
        let bare: Vec<_> = bare.into_iter().flat_map(|package| ["--package", package]).collect();
        for packages in [[&["--workspace"], &host[..]].concat(), bare] {
            let strict = ["--all-targets", "--", "-D", "warnings"];
            console::run(cargo().arg("clippy").args(packages).args(strict))?;
        }
    }

    section("Host tests");
    let mut host = cargo();
    // Behind `--`: given to cargo itself, a filter would make it build what is not built for tests.
    host.args(["test", "--workspace", "--exclude", "machine-tests", "--"]).args(filter);
    count_tests(&mut host, total)?;

    if filter.is_none() {
        section("Interleavings");
        // Built for `loom`, which runs the protocols between CPUs in every order; apart, since its
        // atomics are good for nothing else.
        let mut protocols = cargo();
        protocols
            .args(["test", "--release", "--package", "vmx", "--package", "hv-kernel", "--"])
            .args(["gate::", "wake::", "mailbox::"])
            .env("RUSTFLAGS", "--cfg loom")
            .env("CARGO_TARGET_DIR", target_directory().join("loom"));
        count_tests(&mut protocols, total)?;
    }

    section("Build");
    System::build()?;
    shim::build()?;

    section("Machines");
    println!("{}", Bochs::ensure()?);
    println!("{}", Qemu::ensure()?.version()?);

    section("Machine tests");
    let mut machines = cargo();
    machines
        .args(["test", "--package", "machine-tests", "--lib", "--test", "machine", "--"])
        .args(filter);
    count_tests(&mut machines, total)?;
    if let Some(filter) = filter
        && *total == Count::default()
    {
        bail!("no test has {filter:?} in its name");
    }
    Ok(())
}

/// Runs the tests of the hypervisor under QEMU and KVM, which take longer than all others.
///
/// # Errors
/// If anything failed.
pub fn nested() -> Result<()> {
    let mut total = Count::default();
    let mut tests = cargo();
    tests.args(["test", "--package", "machine-tests", "--test", "nested", "--", "--ignored"]);
    let result = count_tests(&mut tests, &mut total);
    println!("\n{} passed, {} failed", total.passed, total.failed);
    result
}

fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs tests, shows their output as it comes, and adds up the programs' closing lines.
fn count_tests(command: &mut Command, total: &mut Count) -> Result<()> {
    let shown = console::render(command);
    console::verbose(&format!("$ {shown}"));
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run {shown}"))?;
    let output = child.stdout.take().context("no pipe")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        if let Some(count) = closing_line(&line) {
            total.passed += count.passed;
            total.failed += count.failed;
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "{shown}: {status}");
    Ok(())
}

/// Reads `test result: ok. 10 passed; 0 failed; …`.
fn closing_line(line: &str) -> Option<Count> {
    let (_, numbers) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let number = |what: &str| {
        let counts = numbers.split("; ");
        counts.filter_map(|count| count.strip_suffix(what)).find_map(|count| count.parse().ok())
    };
    Some(Count { passed: number(" passed")?, failed: number(" failed")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_counted() {
        let line = "test result: ok. 10 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(closing_line(line), Some(Count { passed: 10, failed: 2 }));
        let failed = "test result: FAILED. 1 passed; 3 failed; 0 ignored; finished in 0.00s";
        assert_eq!(closing_line(failed), Some(Count { passed: 1, failed: 3 }));
        assert_eq!(closing_line("test a::b ... ok"), None);
        assert_eq!(closing_line("test result: odd"), None);
    }
}
