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
use crate::offenders;
use crate::page;
use crate::report;
use crate::symbols;
use crate::system::System;
use crate::timeline::{Clock, Timeline};
use crate::topology::Topology;
use crate::trace;

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
    /// Store a page about the run here: what was seen, who split locks, a time line.
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Store the run here as a trace that ui.perfetto.dev opens.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
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
    run_to(args, &mut io::stdout())
}

/// The same, with what there is to see written to `out`.
///
/// # Errors
/// As there.
pub fn run_to(args: &RunArgs, out: &mut dyn Write) -> Result<()> {
    let emulator = args.emulator()?;
    let mut setup = args.setup.setup()?;
    if args.console {
        setup = setup.with_console()?;
    }
    if (args.report.is_some() || args.trace.is_some()) && args.setup.config.is_none() {
        setup = setup.with_schedule_events();
    }
    // Made now, so that a wrong path is found before the run and not after it.
    let mut outputs = Vec::new();
    for path in [&args.events, &args.truth, &args.report, &args.trace] {
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
    let recording = machine::record(&config, &mut |bytes| {
        // Whoever closed a pipe does not want it; the run goes on.
        let _ = out.write_all(bytes).and_then(|()| out.flush());
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
    let judged = report::judge(&outcome);
    let symbols = symbols::of_setup(&setup, &system);
    let offenders = offenders::all(&outcome.events);
    // A tick of Bochs' counter is an instruction's time.
    let known = (config.emulator == Emulator::Bochs).then_some(config.ips.into());
    let clock = Clock::of_run(&outcome.events, known);
    let timeline = Timeline::of(&outcome.events);
    if let [_, _, page, trace] = &mut *outputs {
        if let Some(file) = page {
            let page = page::text(&page::Run {
                machine: &machine_facts(&config),
                events: &outcome.events,
                clock,
                timeline: &timeline,
                offenders: &offenders,
                symbols: &symbols,
                wrong: judged.as_ref().err().map(String::as_str),
            });
            file.write_all(page.as_bytes()).context("cannot write the report")?;
        }
        if let Some(file) = trace {
            let trace = trace::text(&timeline, &clock)?;
            file.write_all(trace.as_bytes()).context("cannot write the trace")?;
        }
    }
    let mut say = |text: &str| {
        let _ = writeln!(out, "\n{}", text.trim_end());
    };
    // The hypervisor has shown a table of its own if it came to its end.
    let is_over = outcome.events.iter().any(|event| matches!(event.body, Body::Shutdown { .. }));
    if !is_over && outcome.events.iter().any(|event| event.vm().is_some()) {
        say(&report::table(&outcome.events));
    }
    if !offenders.is_empty() {
        say(&offenders::table(&offenders, &symbols, &clock));
    }
    let wants_turns = args.report.is_some() || args.trace.is_some();
    if wants_turns && args.setup.config.is_some() && !timeline.is_scheduled() {
        say("not known: which vCPU ran where. The configuration needs: schedule_events = true");
    }
    match judged {
        Ok(()) => Ok(()),
        Err(why) => bail!("{why}"),
    }
}

/// The machine in words.
fn machine_facts(config: &MachineConfig) -> [(&'static str, String); 4] {
    let (name, detection) = match config.emulator {
        Emulator::Bochs => (
            format!("Bochs, CPU model {}", config.model),
            if config.sld { "by the project's shim" } else { "none" },
        ),
        Emulator::Qemu(accelerator) => {
            (format!("QEMU, {accelerator:?}"), "as the host's CPU has it")
        }
    };
    [
        ("machine", name),
        ("CPUs", config.cpus.to_string()),
        ("memory", format!("{} MiB", config.memory_mib)),
        ("split-lock detection", detection.to_owned()),
    ]
}
