//! The machine layer: how runs end, and what is refused.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use machine_tests::{Disk, check, check_eq, run, sector, trial};
use xtask::machine::{Accelerator, Emulator, Exit, MachineConfig};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("machine::a_silent_machine_is_stopped", silent),
        trial("machine::a_triple_fault_is_noticed", triple_fault),
        trial("machine::a_disk_that_does_not_boot_is_an_end", no_boot),
        trial("machine::an_unknown_cpu_model_is_answered_with_the_models", unknown_model),
        trial("machine::qemu_runs_to_power_off", qemu),
    ]
}

fn silent() -> Result<()> {
    let config = MachineConfig { timeout: Duration::from_secs(5), ..MachineConfig::default() };
    let outcome = run(&Disk::with(&sector::disk(sector::silent()))?, config)?;
    check(&outcome, matches!(outcome.exit, Exit::TimedOut { .. }), "not stopped")?;
    check_eq(&outcome, "last output", outcome.serial.as_str(), "S")
}

fn triple_fault() -> Result<()> {
    let disk = Disk::with(&sector::disk(sector::triple_fault()))?;
    let outcome = run(&disk, MachineConfig::default())?;
    check_eq(&outcome, "end", &outcome.exit, &Exit::CpuShutdown)?;
    check_eq(&outcome, "last output", outcome.serial.as_str(), "S")
}

fn no_boot() -> Result<()> {
    let mut disk = sector::disk(sector::locks());
    disk[510] = 0;
    let outcome = run(&Disk::with(&disk)?, MachineConfig::default())?;
    let Exit::Died { output, .. } = &outcome.exit else {
        return check(&outcome, false, "it booted");
    };
    ensure!(output.contains("No bootable device"), "{output}");
    Ok(())
}

fn unknown_model() -> Result<()> {
    let config = MachineConfig { model: "pentium_9".to_owned(), ..MachineConfig::default() };
    let Err(why) = run(&Disk::with(&sector::disk(sector::locks()))?, config) else {
        anyhow::bail!("it ran");
    };
    let why = why.to_string();
    ensure!(why.contains("pentium_9") && why.contains("arrow_lake"), "{why}");
    Ok(())
}

fn qemu() -> Result<()> {
    let config =
        MachineConfig { emulator: Emulator::Qemu(Accelerator::Tcg), ..MachineConfig::default() };
    let outcome = run(&Disk::with(&sector::disk(sector::msrs()))?, config)?;
    check_eq(&outcome, "end", &outcome.exit, &Exit::PoweredOff)?;
    // Its CPU has neither MSR, or reads them as zero: what counts is that everything came through.
    check(&outcome, outcome.serial.ends_with('.'), "last attempt")?;
    check(&outcome, outcome.events.is_empty() && outcome.truth.is_empty(), "events")
}
