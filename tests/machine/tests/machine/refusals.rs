//! What cannot run is refused with a message that says what is wrong and what to do, and hangs nothing.

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use machine_tests::hypervisor::{boot_guests, find_guest};
use machine_tests::{check, check_eq, trial};
use xtask::config::Policy;
use xtask::events::Body;
use xtask::guests::Guest;
use xtask::machine::{Accelerator, Emulator, Exit, MachineConfig};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("refusal::a_machine_without_vt_x_is_told_so", without_vtx),
        trial("refusal::a_cpu_model_without_vt_x_is_told_so", model_without_vtx),
    ]
}

fn controls() -> Result<&'static Guest> {
    find_guest("controls")
}

/// Runs on a machine where the hypervisor cannot run; why it says that it cannot.
fn refused(config: MachineConfig) -> Result<String> {
    let outcome = boot_guests(Policy::Warn, &[controls()?], config)?;
    check_eq(&outcome, "end", &outcome.exit, &Exit::PoweredOff)?;
    let why = outcome.events.iter().find_map(|event| match &event.body {
        Body::Refused { why } => Some(why.clone()),
        _ => None,
    });
    check(&outcome, why.is_some(), "not refused")?;
    let why = why.unwrap_or_default();
    // The person at the screen sees it too.
    check(&outcome, outcome.serial.contains(&why), "the first serial port does not say why")?;
    Ok(why)
}

fn names_vtx(why: &str) -> bool {
    why.contains("VT-x") || why.contains("VMX")
}

fn without_vtx() -> Result<()> {
    let emulator = Emulator::Qemu(Accelerator::Tcg);
    let why = refused(MachineConfig { emulator, ..MachineConfig::default() })?;
    ensure!(names_vtx(&why), "{why}");
    Ok(())
}

fn model_without_vtx() -> Result<()> {
    let model = "ryzen".to_owned();
    let why = refused(MachineConfig { model, ..MachineConfig::default() })?;
    ensure!(names_vtx(&why), "{why}");
    Ok(())
}
