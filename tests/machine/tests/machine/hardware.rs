//! Machines whose firmware, memory or hardware is not as one would like it.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use machine_tests::hypervisor::{boot_guests, check_guest, check_orderly, find_guest};
use machine_tests::{check, check_eq, trial};
use xtask::config::{HvConfig, Policy, Vm};
use xtask::events::{Body, Event, Totals};
use xtask::guests::Situation;
use xtask::machine::{Exit, MachineConfig, Mishap, MsrWrite, RunOutcome};

use crate::vms;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("hardware::vt_x_that_is_locked_off_is_told", locked_off),
        trial("hardware::a_cpu_whose_vt_x_is_locked_off_is_left_out", one_locked_off),
        trial("hardware::vt_x_that_is_locked_on_is_used", locked_on),
        trial("hardware::hidden_detection_is_told", hidden),
        trial("hardware::registers_of_the_firmware_are_set_right", odd_registers),
        trial("hardware::system_management_interrupts_are_counted", system_management),
        trial("hardware::memory_below_and_above_4_gib", large_memory),
        trial("hardware::memory_that_is_not_write_back_is_left_out", uncached_memory),
        trial("hardware::mtrrs_that_are_off_are_told", mtrrs_off),
        trial("hardware::a_machine_check_ends_the_vm_that_it_hits", machine_check),
        trial("hardware::a_machine_check_of_another_cpu_is_passed_over", passing_machine_check),
        trial("hardware::a_machine_check_that_spoils_the_cpu_is_a_panic", fatal_machine_check),
        trial("hardware::machine_checks_from_before_the_boot_are_told", old_machine_check),
        trial("hardware::a_stray_nmi_is_counted", stray_nmi),
    ]
}

const fn write(number: u32, value: u64) -> MsrWrite {
    MsrWrite { cpu: None, number, value }
}

/// Runs a guest that splits a lock and one that does not.
fn two(config: MachineConfig) -> Result<RunOutcome> {
    boot_guests(Policy::Warn, &[find_guest("split-add-cpl0")?, find_guest("controls")?], config)
}

/// Both guests come to their usual end.
fn both_end(outcome: &RunOutcome) -> Result<()> {
    check_orderly(outcome)?;
    check_guest(outcome, find_guest("split-add-cpl0")?, Situation::Warn)?;
    check_guest(outcome, find_guest("controls")?, Situation::Warn)
}

fn says(outcome: &RunOutcome, text: &str) -> Result<()> {
    check(outcome, outcome.serial.contains(text), &format!("the log lacks {text:?}"))
}

/// How a VM ended.
fn end_of<'a>(outcome: &'a RunOutcome, name: &str) -> Result<(&'a str, Option<u32>)> {
    let end = |event: &'a Event| match &event.body {
        Body::VmEnd { vm, reason, status, .. } if vm == name => Some((reason.as_str(), *status)),
        _ => None,
    };
    outcome.events.iter().find_map(end).with_context(|| format!("{name} has no end"))
}

// ---- Firmware. ---------------------------------------------------------------------------------

/// IA32_FEATURE_CONTROL.
const FEATURE_CONTROL: u32 = 0x3a;

fn locked_off() -> Result<()> {
    let left_over = vec![write(FEATURE_CONTROL, 1)];
    let outcome = two(MachineConfig { left_over, ..MachineConfig::default() })?;
    check_eq(&outcome, "end", &outcome.exit, &Exit::PoweredOff)?;
    let refused = |event: &Event| matches!(&event.body, Body::Refused { .. });
    check(&outcome, outcome.events.iter().any(refused), "not refused")?;
    says(&outcome, "\"Intel Virtualization Technology\" (VT-x, VMX) in the firmware setup")
}

fn one_locked_off() -> Result<()> {
    let left_over = vec![MsrWrite { cpu: Some(1), ..write(FEATURE_CONTROL, 1) }];
    let config = MachineConfig { left_over, cpus: 3.into(), ..MachineConfig::default() };
    let outcome = two(config)?;
    both_end(&outcome)?;
    says(&outcome, "the CPU with APIC ID 1 is not used: VT-x is disabled")?;
    let online = outcome.events.iter().filter_map(|event| match event.body {
        Body::CpuOnline { apic_id, .. } => Some(apic_id),
        _ => None,
    });
    check_eq(&outcome, "APIC IDs", online.collect::<Vec<_>>(), vec![0, 2])
}

fn locked_on() -> Result<()> {
    let left_over = vec![write(FEATURE_CONTROL, 5)];
    both_end(&two(MachineConfig { left_over, ..MachineConfig::default() })?)
}

fn hidden() -> Result<()> {
    let config = MachineConfig { sld: false, ..MachineConfig::default() };
    let outcome = boot_guests(Policy::Warn, &[find_guest("controls")?], config)?;
    check_orderly(&outcome)?;
    says(&outcome, "CPUID announces IA32_CORE_CAPABILITIES but reading it faults")
}

/// PAT; x2APIC mode on both CPUs; MISC_ENABLE with "limit CPUID" and without "no execute".
fn odd_registers() -> Result<()> {
    let x2apic = [write(0x1b, 0xfee0_0c00), MsrWrite { cpu: Some(0), ..write(0x1b, 0xfee0_0d00) }];
    let misc = write(0x1a0, 1 << 34 | 1 << 22 | 1);
    for left_over in [vec![write(0x277, 0x0007_0106_0007_0106)], x2apic.into(), vec![misc]] {
        let config = MachineConfig { left_over, cpus: 2.into(), ..MachineConfig::default() };
        let outcome = two(config)?;
        both_end(&outcome)?;
        check_eq(&outcome, "NMIs of nobody", totals(&outcome)?.unknown_nmis, 0)?;
    }
    Ok(())
}

/// A CPU that counts system-management interrupts; there are none here.
fn system_management() -> Result<()> {
    let left_over = vec![write(0x34, 7)];
    let outcome = two(MachineConfig { left_over, ..MachineConfig::default() })?;
    both_end(&outcome)?;
    says(&outcome, "0 system-management interrupts during the run")
}

// ---- Memory. -----------------------------------------------------------------------------------

/// 6 GiB, of which two and a half lie above 4 GiB: a VM that would take more is told how much there is.
/// Memory is given out from the top, so the others live above 4 GiB.
fn large_memory() -> Result<()> {
    let of = |name| find_guest(name).map(Vm::of_guest);
    let vms = vec![
        of("split-add-cpl0")?,
        of("controls")?,
        Vm { name: "huge".to_owned(), memory_mib: 8192, ..of("controls")? },
    ];
    let config = MachineConfig { memory_mib: 6144, ..MachineConfig::default() };
    let outcome = vms::run(&HvConfig::new(Policy::Warn, vms), config)?;
    both_end(&outcome)?;
    let why = outcome.events.iter().find_map(|event| match &event.body {
        Body::VmRefused { vm, why } if vm == "huge" => Some(why.as_str()),
        _ => None,
    });
    let why = why.context("the huge VM is not refused")?;
    let free =
        why.split(", ").find_map(|part| part.strip_suffix(" MiB are free; lower its memory_mib"));
    let free: u32 = free.with_context(|| why.to_owned())?.parse()?;
    ensure!((6050..6144).contains(&free), "{why}");
    Ok(())
}

/// IA32_MTRR_DEF_TYPE, and the last of eight variable ranges.
const MTRR_DEFAULT: u32 = 0x2ff;
const MTRR_BASE7: u32 = 0x20e;
const MTRR_MASK7: u32 = 0x20f;

/// 32 MiB in the upper half of 256 MiB, as a firmware that has miscounted has them. The second CPU has
/// yet other MTRRs.
fn uncached_memory() -> Result<()> {
    const MASK: u64 = 0xf_fe00_0800;
    let second = MsrWrite { cpu: Some(1), ..write(MTRR_BASE7, 0xa00_0001) };
    let first = write(MTRR_BASE7, 0xa00_0000);
    let left_over = vec![first, second, write(MTRR_MASK7, MASK)];
    let config = MachineConfig { left_over, cpus: 2.into(), ..MachineConfig::default() };
    let outcome = two(config)?;
    both_end(&outcome)?;
    says(&outcome, "memory 0xa000000..0xc000000 is not used: its type is UC, not write-back")?;
    says(&outcome, "the CPU with APIC ID 1 has other MTRRs than the boot CPU")
}

fn mtrrs_off() -> Result<()> {
    let left_over = vec![write(MTRR_DEFAULT, 6)];
    let outcome = two(MachineConfig { left_over, ..MachineConfig::default() })?;
    both_end(&outcome)?;
    says(&outcome, "the MTRRs are off")
}

// ---- Hardware that fails. ----------------------------------------------------------------------

const MCG_STATUS: u32 = 0x17a;
/// IA32_MC1_STATUS; the address and miscellaneous information follow.
const MC1_STATUS: u32 = 0x405;
/// IA32_MCG_STATUS: execution can go on; where it was has to do with the error; in progress.
const RIPV: u64 = 1;
const EIPV: u64 = 2;
const MCIP: u64 = 4;
/// A data load that hit bad memory, as SDM volume 3, section "Architecturally Defined SRAR Errors", has
/// it: valid, uncorrected, enabled, with address and miscellaneous information, signalled, action required.
const DATA_LOAD: u64 = 0xbd80_0000_0000_0134;
/// A memory error that was corrected: valid, enabled, with address and miscellaneous information.
const CORRECTED: u64 = 0x9c00_0040_0001_009f;
/// IA32_MCi_STATUS: the processor's context is corrupt.
const PCC: u64 = 1 << 57;

fn with_machine_check(mcg_status: u64, bank_status: u64) -> Result<RunOutcome> {
    let mut writes = vec![write(MCG_STATUS, mcg_status | MCIP)];
    if bank_status != 0 {
        // A physical address, exact to the cache line.
        let registers = [bank_status, 0x0123_4540, 2 << 6 | 6];
        writes.extend((MC1_STATUS..).zip(registers).map(|(number, value)| write(number, value)));
    }
    let mishap = Some(Mishap::MachineCheck(writes));
    two(MachineConfig { mishap, ..MachineConfig::default() })
}

/// What an event tells of a machine check: VM, bank, status and verdict.
type Told<'a> = (Option<&'a str>, Option<u8>, Option<u64>, &'a str);

fn machine_checks(outcome: &RunOutcome) -> Vec<Told<'_>> {
    let events = outcome.events.iter();
    let told = events.filter_map(|event| match &event.body {
        Body::MachineCheck { vm, bank, status, verdict, .. } => {
            Some((vm.as_deref(), *bank, status.map(|status| status.0), verdict.as_str()))
        }
        _ => None,
    });
    told.collect()
}

fn totals(outcome: &RunOutcome) -> Result<Totals> {
    let totals = outcome.events.iter().find_map(|event| match event.body {
        Body::Shutdown { counters } => Some(counters),
        _ => None,
    });
    totals.context("no shutdown")
}

fn machine_check() -> Result<()> {
    let outcome = with_machine_check(RIPV | EIPV, DATA_LOAD)?;
    check_orderly(&outcome)?;
    check_eq(&outcome, "end", end_of(&outcome, "split-add-cpl0")?, ("machine check", None))?;
    check_guest(&outcome, find_guest("controls")?, Situation::Warn)?;
    let expected = vec![(Some("split-add-cpl0"), Some(1), Some(DATA_LOAD), "end-vm")];
    check_eq(&outcome, "machine checks", machine_checks(&outcome), expected)?;
    says(&outcome, "bank 1: status 0xbd80000000000134, address 0x1234540")?;
    says(&outcome, "memory at 0x1234000 is bad: not used any more")
}

fn passing_machine_check() -> Result<()> {
    let outcome = with_machine_check(RIPV, 0)?;
    both_end(&outcome)?;
    let expected = vec![(Some("split-add-cpl0"), None, None, "go-on")];
    check_eq(&outcome, "machine checks", machine_checks(&outcome), expected)?;
    // One that the hardware has corrected at the same time.
    let outcome = with_machine_check(RIPV, CORRECTED)?;
    both_end(&outcome)?;
    check_eq(&outcome, "machine checks", machine_checks(&outcome), vec![])?;
    check_eq(&outcome, "errors that are counted", totals(&outcome)?.corrected_errors, 1)?;
    says(&outcome, "1 errors that the hardware has corrected")
}

fn fatal_machine_check() -> Result<()> {
    let outcome = with_machine_check(RIPV | EIPV, DATA_LOAD | PCC)?;
    let message = outcome.events.iter().find_map(|event| match &event.body {
        Body::Panic { message } => Some(message.clone()),
        _ => None,
    });
    let message = message.unwrap_or_default();
    ensure!(message.contains("bank 1: status 0xbf80000000000134"), "panic: {message:?}");
    ensure!(message.contains("while VM split-add-cpl0 ran"), "panic: {message:?}");
    Ok(())
}

fn old_machine_check() -> Result<()> {
    // A corrected error, and the machine check that has reset the machine.
    let writes = [(0x401, CORRECTED), (0x402, 0xabc0), (0x403, 0x86)];
    let fatal = [(MC1_STATUS, 0xb200_0000_8000_0402), (MCG_STATUS, MCIP)];
    let left_over = writes.into_iter().chain(fatal).map(|(number, value)| write(number, value));
    let config = MachineConfig { left_over: left_over.collect(), ..MachineConfig::default() };
    let outcome = two(config)?;
    both_end(&outcome)?;
    says(&outcome, "machine check before the boot, APIC ID 0: bank 0: status 0x9c0000400001009f")?;
    says(&outcome, "machine check before the boot, APIC ID 0: bank 1: status 0xb200000080000402")?;
    check_eq(&outcome, "machine checks of this run", machine_checks(&outcome), vec![])
}

fn stray_nmi() -> Result<()> {
    let mishap = Some(Mishap::Nmi);
    let outcome = two(MachineConfig { mishap, ..MachineConfig::default() })?;
    both_end(&outcome)?;
    says(&outcome, "an NMI that the hypervisor has not sent, 1 so far there")?;
    says(&outcome, "1 NMIs that the hypervisor has not sent")?;
    let Totals { nmis, unknown_nmis, .. } = totals(&outcome)?;
    check_eq(&outcome, "NMIs that are counted", (nmis, unknown_nmis), (1, 1))
}
