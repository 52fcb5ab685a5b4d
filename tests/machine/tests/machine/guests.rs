//! Every test guest in every situation, alone and all together, against its entry in the registry and the
//! ground truth.

use anyhow::Result;
use libtest_mimic::Trial;
use machine_tests::hypervisor::{boot_guests, check_guest, check_orderly, check_split_locks, make};
use machine_tests::trial;
use xtask::guests::{GUESTS, Guest, Situation};
use xtask::machine::MachineConfig;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for situation in Situation::ALL {
        let name = |guest: &str| format!("guest::{guest}::{situation:?}").to_lowercase();
        for guest in GUESTS {
            trials.push(trial(name(guest.name), move || run(&[guest], situation)));
        }
        trials.push(trial(name("all"), move || run(&GUESTS.iter().collect::<Vec<_>>(), situation)));
    }
    trials
}

/// Memory of the machine, in MiB, besides that of its VMs.
const MACHINE_MIB: u32 = 256;

fn run(guests: &[&Guest], situation: Situation) -> Result<()> {
    let (sld, config) = make(situation);
    let memory_mib = MACHINE_MIB + guests.iter().map(|guest| guest.memory_mib).sum::<u32>();
    let config = MachineConfig { memory_mib, ..config };
    let outcome = boot_guests(sld, guests, config)?;
    check_orderly(&outcome)?;
    for guest in guests {
        check_guest(&outcome, guest, situation)?;
    }
    check_split_locks(&outcome, guests, situation)
}
