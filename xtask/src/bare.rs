//! Building what runs without an operating system: the one place for how these are compiled and
//! linked.
//!
//! Everything is built for the host's own target, as freestanding static executables: no other
//! target's standard library need be installed. Each part has a target directory of its own, since
//! their flags differ. What is built does not depend on where the project and cargo's files are.

use std::{
    env,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// Given explicitly, so that the flags do not reach build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// For all parts: a static executable, linked by the toolchain's own linker, whose code survives
/// interrupts on its stack and does not unwind.
const FLAGS: [&str; 6] = [
    "-Clinker=rust-lld",
    "-Clinker-flavor=ld.lld",
    "-Clink-arg=-static",
    "-Clink-arg=--no-dynamic-linker",
    "-Cno-redzone=yes",
    "-Cpanic=abort",
];

/// What debugging information calls the project's root.
pub const SOURCES: &str = ".";

/// At fixed addresses.
const FIXED: &str = "-Crelocation-model=static";

/// Something that is built for the bare machine.
struct Part {
    package: &'static str,
    /// Which executable of the package; all without it.
    executable: Option<&'static str>,
    /// Relative to the project's root.
    linker_script: &'static str,
    flags: &'static [&'static str],
}

const KERNEL: Part = Part {
    package: "hv-kernel",
    executable: None,
    linker_script: "hv-kernel/kernel.ld",
    // Linked into the highest 2 GiB.
    flags: &[FIXED, "-Ccode-model=kernel"],
};

const BIOS: Part = Part {
    package: "boot",
    executable: Some("boot"),
    linker_script: "boot/bios.ld",
    flags: &[FIXED],
};

const UEFI: Part = Part {
    package: "boot",
    executable: Some("uefi"),
    linker_script: "boot/uefi.ld",
    // Firmware decides about the address.
    flags: &["-Crelocation-model=pic", "-Clink-arg=-pie"],
};

const GUESTS: Part = Part {
    package: "guests",
    executable: None,
    linker_script: "tests/guests/guest.ld",
    flags: &[FIXED],
};

const LINUX_INIT: Part = Part {
    package: "linux-init",
    executable: None,
    linker_script: "tests/linux/init.ld",
    flags: &[FIXED],
};

/// Builds the hypervisor's kernel; its ELF file.
pub fn kernel() -> Result<PathBuf> {
    KERNEL.build_one()
}

/// Builds the BIOS stage of the loader; its ELF file.
pub fn boot() -> Result<PathBuf> {
    BIOS.build_one()
}

/// Builds the UEFI loader; its ELF file, of which [`pe`](crate::pe) makes what firmware loads.
pub fn uefi() -> Result<PathBuf> {
    UEFI.build_one()
}

/// Builds the process that runs in the Linux of the nested tests; its ELF file.
pub fn linux_init() -> Result<PathBuf> {
    LINUX_INIT.build_one()
}

/// Builds the test guests; the name and the ELF file of each, sorted by name.
pub fn guests() -> Result<Vec<(String, PathBuf)>> {
    GUESTS.build()
}

/// The project's root directory.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is in the project")
}

/// Where cargo unpacks the sources of packages, if that can be found out.
fn sources_of_packages() -> Option<PathBuf> {
    let home = match env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => env::home_dir()?.join(".cargo"),
    };
    Some(home.join("registry/src"))
}

/// The flag that has panics' messages and debugging information call `directory` something else.
fn renamed(directory: &Path, name: &str) -> String {
    format!("--remap-path-prefix={}={name}", directory.display())
}

/// The part that we need of cargo's messages on standard output, one JSON object a line.
#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

impl Part {
    fn build_one(&self) -> Result<PathBuf> {
        let mut built = self.build()?;
        ensure!(
            built.len() == 1,
            "{} has {} executables instead of one",
            self.package,
            built.len()
        );
        Ok(built.remove(0).1)
    }

    /// Runs cargo, whose progress and complaints the user sees as they come. Nothing is done if
    /// nothing has changed.
    fn build(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut flags: Vec<_> = FLAGS.iter().chain(self.flags).map(ToString::to_string).collect();
        // Cargo has the compiler, and so the linker, run in the project's root.
        flags.push(format!("-Clink-arg=-T{}", self.linker_script));
        flags.push(renamed(root(), SOURCES));
        flags.extend(sources_of_packages().map(|directory| renamed(&directory, "/packages")));
        let directory = self.executable.unwrap_or(self.package);
        let target_dir = crate::target_directory().join("bare").join(directory);
        let executables = match self.executable {
            Some(name) => vec!["--bin", name],
            None => vec!["--bins"],
        };
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .current_dir(root())
            .args(["build", "--release", "--message-format=json-render-diagnostics"])
            .args(executables)
            .args(["--package", self.package, "--target", TARGET, "--target-dir"])
            .arg(target_dir)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start cargo")?;
        let output = cargo.stdout.take().expect("it is piped");
        let mut built = Vec::new();
        for line in BufReader::new(output).lines() {
            let message: Message =
                serde_json::from_str(&line?).context("cannot read cargo's messages")?;
            if let (Some(executable), Some(target)) = (message.executable, message.target) {
                built.push((target.name, executable));
            }
        }
        if !cargo.wait()?.success() {
            bail!("building {} failed", self.package);
        }
        built.sort();
        Ok(built)
    }
}
