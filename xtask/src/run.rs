//! `cargo xtask run`: builds, boots, shows.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::config::{Policy, Setup, SldSource};
use crate::events::Body;
use crate::firmware::Firmware;
use crate::machine::{self, Emulator, Exit, Input, MachineConfig};
use crate::report;
use crate::system::System;
use crate::topology::Topology;

/// What is configured and which guests run.
#[derive(Args, Debug)]
pub struct SetupArgs {
    /// What the host does about split locks.
    #[arg(long, default_value = "warn", value_name = "POLICY")]
    pub sld: Policy,
    /// Where split locks are detected: by the CPU (msr), by looking at each instruction (trace), not at all (none), or by
    /// the CPU where it can and else by looking (auto).
    #[arg(long, value_name = "SOURCE")]
    pub source: Option<SldSource>,
    /// A guest to run: the name of a test guest or an image file. May be given several times. Without it, a few test guests show what there is.
    #[arg(long, value_name = "NAME-or-PATH")]
    pub guest: Vec<String>,
    /// Show split-lock detection to the guests that are given as files (test guests know themselves).
    #[arg(long)]
    pub expose_sld: bool,
    /// A configuration (hv.toml) of your own instead of a generated one. Its images are guests/NAME: files of a directory `guests` beside it, or test guests.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sld", "source", "guest", "expose_sld"])]
    pub config: Option<PathBuf>,
}

impl SetupArgs {
    /// The setup that was asked for.
    ///
    /// # Errors
    /// If a guest or the configuration cannot be used.
    pub fn setup(&self) -> Result<Setup> {
        match &self.config {
            Some(file) => Setup::of_file(file),
            None => Setup::of_guests_by(self.sld, self.source, &self.guest, self.expose_sld),
        }
    }

    /// The same for a stick that people edit and boot a real machine from.
    ///
    /// # Errors
    /// As there.
    pub fn stick_setup(&self) -> Result<Setup> {
        match &self.config {
            Some(file) => Setup::of_file(file),
            None => {
                Setup::of_guests_for_people(self.sld, self.source, &self.guest, self.expose_sld)
            }
        }
    }
}

/// `--machine`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MachineArg {
    /// Bochs, which has VT-x and, by this project's shim, split-lock detection.
    Bochs,
    /// QEMU, which has VT-x only with KVM on an Intel host with nested virtualization.
    Qemu,
}

/// Arguments of `run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    setup: SetupArgs,
    /// The machine. Default: QEMU where KVM lets it have VT-x, else Bochs.
    #[arg(long, value_enum)]
    machine: Option<MachineArg>,
    /// What boots it.
    #[arg(long, value_enum, default_value = "bios")]
    firmware: Firmware,
    /// The CPUs: how many, or how many packages, cores of each and threads of each of these.
    #[arg(long, default_value = "1", value_name = "N-or-PACKAGES:CORES:THREADS")]
    cpus: Topology,
    /// Bochs' CPU model.
    #[arg(long, default_value = "arrow_lake")]
    model: String,
    /// The machine's memory in MiB.
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u32).range(16..=65536))]
    memory: u32,
    /// Store the events here, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Store the ground truth here, one JSON object for every split lock (Bochs only).
    #[arg(long, value_name = "FILE")]
    truth: Option<PathBuf>,
    /// A machine without split-lock detection (Bochs only).
    #[arg(long)]
    no_sld: bool,
    /// Connect this terminal with the machine's first serial port, where the hypervisor takes commands: type help.
    /// Control-C ends it.
    #[arg(long)]
    console: bool,
    /// Stop the machine when it says nothing for so long.
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
}

impl RunArgs {
    /// The machine that was asked for, or the best one that can do what was asked.
    fn emulator(&self) -> Result<Emulator> {
        let needs_bochs = self.truth.is_some() || self.no_sld;
        match self.machine {
            Some(MachineArg::Qemu) => {
                ensure!(
                    !needs_bochs,
                    "--truth and --no-sld need --machine bochs: QEMU has no split-lock detection"
                );
                Ok(Emulator::qemu())
            }
            Some(MachineArg::Bochs) => Ok(Emulator::Bochs),
            None if needs_bochs => Ok(Emulator::Bochs),
            None => Ok(Emulator::best()),
        }
    }
}

/// Runs it.
///
/// # Errors
/// If anything is missing, or if the hypervisor did not come up, run its VMs to their ends and shut down in order.
pub fn run(args: &RunArgs) -> Result<()> {
    let emulator = args.emulator()?;
    let setup = args.setup.setup()?;
    let setup = if args.console { setup.with_console()? } else { setup };
    // Made now, so that a wrong path is found before the run and not after it.
    let mut outputs = Vec::new();
    for path in [&args.events, &args.truth] {
        let create = |path: &PathBuf| {
            fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))
        };
        outputs.push(path.as_ref().map(create).transpose()?);
    }

    let system = System::build()?;
    let disk = system.temporary_disk(&setup)?;
    let config = MachineConfig {
        emulator,
        image: disk.path().to_owned(),
        firmware: args.firmware,
        cpus: args.cpus,
        model: args.model.clone(),
        memory_mib: args.memory,
        sld: !args.no_sld,
        timeout: Duration::from_secs(args.timeout),
        input: if args.console { Input::Terminal } else { Input::None },
        ..MachineConfig::default()
    };
    let mut stdout = io::stdout();
    let recording = machine::record(&config, &mut |bytes| {
        // Whoever closed the pipe does not want it; the run goes on.
        let _ = stdout.write_all(bytes).and_then(|()| stdout.flush());
    })?;
    for (file, text) in outputs.iter_mut().zip([&recording.events, &recording.truth]) {
        if let Some(file) = file {
            file.write_all(text.as_bytes()).context("cannot write the records")?;
        }
    }
    if recording.exit == Exit::Left {
        return Ok(());
    }
    let outcome = recording.parse()?;
    // The hypervisor has shown a table of its own if it came to its end.
    let is_over = outcome.events.iter().any(|event| matches!(event.body, Body::Shutdown { .. }));
    if !is_over && outcome.events.iter().any(|event| event.vm().is_some()) {
        println!("\n{}", report::table(&outcome.events));
    }
    match report::judge(&outcome) {
        Ok(()) => Ok(()),
        Err(why) => bail!("{why}"),
    }
}
