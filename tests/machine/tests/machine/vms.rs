//! Machines whose hypervisor runs VMs of test guests.

use anyhow::{Context, Error, Result};
use machine_tests::hypervisor::{boot, check_orderly};
use machine_tests::{check, explain};
use xtask::config::{HvConfig, Setup, Source, Vm};
use xtask::events::Body;
use xtask::guests;
use xtask::machine::{MachineConfig, RunOutcome};

/// Runs these VMs of test guests to their ends.
///
/// # Errors
/// If the run was not orderly: see [`check_orderly`]; or if a kick was taken for an NMI of the platform.
pub fn run(config: &HvConfig, machine: MachineConfig) -> Result<RunOutcome> {
    let outcome = boot(&setup(config.to_text()?, &config.vms)?, machine)?;
    check_orderly(&outcome)?;
    let mistaken = outcome.events.iter().any(
        |event| matches!(event.body, Body::Shutdown { counters } if counters.unknown_nmis > 0),
    );
    check(&outcome, !mistaken, "an NMI that nobody has sent")?;
    Ok(outcome)
}

/// This text as `hv.toml`, with the images of these VMs, which are those of test guests.
///
/// # Errors
/// If one is not.
pub fn setup(config: String, vms: &[Vm]) -> Result<Setup> {
    let mut images: Vec<(String, Source)> = Vec::new();
    for image in vms.iter().map(|vm| &vm.image) {
        if images.iter().any(|(known, _)| known == image) {
            continue;
        }
        let guest = image.strip_prefix("guests/").and_then(guests::find);
        let guest = guest.with_context(|| format!("{image} is not the image of a test guest"))?;
        images.push((image.clone(), Source::Registered(guest.name)));
    }
    Ok(Setup { config, images })
}

/// Adds to an error what the machine said and did, and on which machine it was.
pub fn on(machine: &str, outcome: &RunOutcome, why: Error) -> Error {
    explain(outcome, why).context(format!("machine: {machine}"))
}
