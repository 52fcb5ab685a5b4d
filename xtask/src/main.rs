//! `cargo xtask`: builds, boots and tests the hypervisor.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::bench::BenchArgs;
use xtask::flash::FlashArgs;
use xtask::run::RunArgs;
use xtask::stick::{ReportArgs, StickArgs};
use xtask::stress::StressArgs;
use xtask::system::System;
use xtask::{bench, console, doctor, flash, run, stick, stress, suite};

/// Builds, boots and tests the hypervisor.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Arguments {
    /// Show versions and every command that is run.
    #[arg(short, long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Say what is there, what is missing and how to get it.
    Doctor,
    /// Build the loader, the hypervisor and the test guests.
    Build,
    /// Write a disk image that boots the hypervisor on a PC, by BIOS or UEFI.
    Image {
        /// The image.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        #[command(flatten)]
        stick: StickArgs,
    },
    /// Write such an image to a USB stick, check it, and leave the rest of the stick unused.
    Flash(FlashArgs),
    /// Print the log that the last run left on a stick, with what to do with it.
    Report(ReportArgs),
    /// Boot the hypervisor in an emulator, run guests, show what was decided.
    Run(RunArgs),
    /// Run VMs of several vCPUs on several CPUs, move them about all the time, and check everything that they did.
    Stress(StressArgs),
    /// Measure what VM exits cost, in instructions on the reference machine.
    Bench(BenchArgs),
    /// Check and test everything.
    Test {
        /// Only the tests whose names contain this, and no formatting, no lints, no interleavings.
        #[arg(long, value_name = "TEXT")]
        filter: Option<String>,
        /// Instead of all that: the hypervisor under QEMU and KVM, in a Linux in the reference machine.
        #[arg(long, conflicts_with = "filter")]
        nested: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    console::set_verbose(arguments.verbose);
    match perform(arguments.task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("error: {why:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<()> {
    match task {
        Task::Doctor => doctor::run(),
        Task::Build => System::build()?.check(),
        Task::Image { out, stick } => stick::image(&stick, &out),
        Task::Flash(arguments) => flash::run(&arguments),
        Task::Report(arguments) => stick::report(&arguments),
        Task::Run(arguments) => run::run(&arguments),
        Task::Stress(arguments) => stress::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Test { nested: true, .. } => suite::nested(),
        Task::Test { filter, .. } => suite::run(filter.as_deref()),
    }
}
