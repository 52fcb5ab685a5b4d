//! What is linked for the bare machine: rights, and no data below the stack pointer.

use anyhow::Result;
use libtest_mimic::Trial;
use machine_tests::hypervisor::system;
use machine_tests::trial;
use xtask::guests::GUESTS;
use xtask::links;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("links::kernel", || links::check_kernel(system()?.kernel())),
        trial("links::bios_stage", || links::check_bios_stage(system()?.bios())),
        trial("links::uefi_stage", || links::check_uefi_stage(system()?.uefi())),
        trial("links::guests", guests),
    ]
}

fn guests() -> Result<()> {
    GUESTS.iter().try_for_each(|guest| links::check_guest(system()?.guest(guest.name)?))
}
