//! The yardstick of `cargo xtask bench`: what a guest measures by RDTSC is what the machine counts.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use machine_tests::trial;
use xtask::bench::measure;
use xtask::system::System;

pub fn trials() -> Vec<Trial> {
    vec![trial("bench::guest_and_machine_count_the_same", counts)]
}

/// Rows, and the instructions of theirs that the guest executes itself: the one that exits, and the
/// three of its handler where that raises an exception.
const ROWS: [(&str, u64); 13] = [
    ("exception", 3),
    ("cpuid", 1),
    ("rdmsr", 1),
    ("wrmsr_0x33_same", 1),
    ("rdmsr_gp", 4),
    ("uart_data", 1),
    ("in_nobody", 1),
    ("ac_legacy", 4),
    ("ac_split_lock", 4),
    // The lock that is tried and the one that happens; the exit after a step counts as one more.
    ("ac_step", 3),
    ("ac_emulate", 1),
    ("ac_emulate_page", 1),
    ("ac_warn", 2),
];

fn counts() -> Result<()> {
    let measured = measure(&System::build()?)?;
    let find = |name: &'static str| measured.iter().find(|row| row.name() == name).context(name);
    for (name, in_guest) in ROWS {
        let row = find(name)?;
        let expected = row.in_hypervisor() + in_guest;
        ensure!(row.median() == Some(expected), "{name}: {:?}, not {expected}", row.median());
    }
    // A function that is always inlined has instructions of its own.
    let inlined = "vmx::instruction::CurrentVmcs::read";
    ensure!(find("cpuid")?.functions().any(|name| name == inlined), "no instructions of {inlined}");
    ensure!(find("vcpu_switch")?.median().is_some(), "no vCPU was switched");
    Ok(())
}
