//! Machines whose hypervisor runs several VMs of one test guest.

use anyhow::{Error, Result, anyhow};
use machine_tests::explain;
use machine_tests::hypervisor::boot;
use xtask::config::{HvConfig, Setup, SldMode, Source, Vm};
use xtask::guests::Guest;
use xtask::machine::{MachineConfig, RunOutcome};
use xtask::report;

/// VMs that share a CPU.
pub struct Vms {
    /// The guest in all of them.
    pub guest: &'static Guest,
    /// The host's mode.
    pub sld: SldMode,
    /// For how many ticks of the time-stamp counter each may run when it has its turn.
    pub slice_ticks: u64,
    /// The VMs.
    pub vms: Vec<Vm>,
}

impl Vms {
    /// Runs them to their ends.
    ///
    /// # Errors
    /// If the hypervisor did not come up, run them and shut down in order.
    pub fn run(&self, config: MachineConfig) -> Result<RunOutcome> {
        let text = HvConfig { sld: self.sld, vms: self.vms.clone() }.to_text()?;
        let setup = Setup {
            config: format!("slice_ticks = {}\n{text}", self.slice_ticks),
            images: vec![(Vm::of_guest(self.guest).image, Source::Registered(self.guest.name))],
        };
        let outcome = boot(&setup, config)?;
        match report::judge(&outcome) {
            Ok(()) => Ok(outcome),
            Err(why) => Err(explain(&outcome, anyhow!("{why}"))),
        }
    }
}

/// Adds to an error what the machine said and did, and on which machine it was.
pub fn on(machine: &str, outcome: &RunOutcome, why: Error) -> Error {
    explain(outcome, why).context(format!("machine: {machine}"))
}
