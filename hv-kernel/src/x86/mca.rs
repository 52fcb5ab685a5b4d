//! This CPU's machine-check banks: see [`crate::machine_check`].

use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arrayvec::ArrayVec;

use super::msr as access;
use crate::machine_check::{Bank, Capabilities, Grade, Place, Report, Verdict, msr};
use crate::percpu::PerCpu;
use crate::{events, memory, percpu};

/// The banks can be read: a #MC handler must not take a #GP.
static USABLE: AtomicBool = AtomicBool::new(false);

/// Errors that the hardware has corrected.
static CORRECTED: AtomicU64 = AtomicU64::new(0);

fn read(number: u32) -> Option<u64> {
    // SAFETY: reading a machine-check MSR has no side effect.
    unsafe { access::read(number) }.ok()
}

fn write(number: u32, value: u64) -> Option<()> {
    // SAFETY: the value is one of this module's: statuses are cleared, reports switched on.
    unsafe { access::write(number, value) }.ok()
}

/// Switches all reports of this CPU on, as Linux does, and returns the errors that were left from
/// before. `None` if it has no banks that can be used.
pub fn start(is_first: bool) -> Option<Report> {
    const MCE_AND_MCA: u32 = 1 << 7 | 1 << 14;
    let found = (__cpuid(1).edx & MCE_AND_MCA == MCE_AND_MCA).then(switch_on).flatten();
    // With one CPU whose banks cannot be read, no handler reads any.
    USABLE
        .store(found.is_some() && (is_first || USABLE.load(Ordering::Relaxed)), Ordering::Relaxed);
    found
}

fn switch_on() -> Option<Report> {
    let capabilities = Capabilities::of(read(msr::CAPABILITIES)?);
    read(msr::STATUS)?;
    let mut banks = ArrayVec::new();
    for number in 0..capabilities.banks {
        read(msr::bank_status(number))?;
        banks.extend(Bank::read(number, read));
        write(msr::bank_status(number), 0)?;
        write(msr::bank_control(number), u64::MAX)?;
    }
    if capabilities.has_control {
        write(msr::CONTROL, u64::MAX)?;
    }
    // Left over, it would make the next machine check a shutdown.
    write(msr::STATUS, 0)?;
    Some(Report { status: 0, recovers: capabilities.recovers, banks })
}

/// What this CPU's banks say.
fn report() -> Report {
    let mut report = Report { status: 0, recovers: false, banks: ArrayVec::new() };
    if USABLE.load(Ordering::Relaxed)
        && let Some(capabilities) = read(msr::CAPABILITIES).map(Capabilities::of)
    {
        report.status = read(msr::STATUS).unwrap_or(0);
        report.recovers = capabilities.recovers;
        report.banks.extend((0..capabilities.banks).filter_map(|bank| Bank::read(bank, read)));
    }
    report
}

/// A machine check is dealt with: the next one may come.
fn finish() {
    if USABLE.load(Ordering::Relaxed) {
        let _ = write(msr::STATUS, 0);
    }
}

/// #MC in the hypervisor. Takes no lock: whatever it interrupted may hold one.
///
/// # Panics
///
/// Unless this CPU has nothing to do with it.
pub fn in_hypervisor() {
    let report = report();
    assert!(
        report.verdict(Place::Hypervisor) == Verdict::GoOn,
        "the hardware has failed: {report}, in the hypervisor"
    );
    // What the banks hold is told when that is possible.
    if let Some(cpu) = percpu::try_this() {
        cpu.notices.machine_check();
    }
    finish();
}

/// #MC while a guest of this VM ran: whether it can go on.
///
/// # Panics
///
/// If nothing can be relied upon any more.
pub fn in_guest(cpu: &PerCpu, vm: &'static str) -> bool {
    let report = report();
    let verdict = report.verdict(Place::Guest);
    assert!(
        verdict != Verdict::Panic,
        "the hardware has failed: {report}, on CPU {} while VM {vm} ran",
        cpu.index
    );
    if verdict == Verdict::EndVm {
        log::error!("{report}, on CPU {} while VM {vm} ran: it ends", cpu.index);
    }
    tell(cpu, &report, Some((vm, verdict)));
    finish();
    verdict == Verdict::GoOn
}

/// A machine check that was another CPU's has come in the hypervisor: tells what the banks hold.
pub fn tell_passed(cpu: &PerCpu) {
    tell(cpu, &report(), None);
}

/// Tells of each error that is not corrected, has no more use made of bad memory, and clears the
/// banks; but for an error that another thread has hit, which is that thread's to find.
fn tell(cpu: &PerCpu, report: &Report, guest: Option<(&str, Verdict)>) {
    let verdict = guest.map_or(Verdict::GoOn, |(_, verdict)| verdict);
    if report.banks.is_empty() {
        log::warn!("{report}, on CPU {}: it goes on", cpu.index);
        event(None, guest.map(|(vm, _)| vm), verdict);
    }
    for bank in &report.banks {
        let grade = bank.grade(report.recovers);
        if grade == Grade::Corrected {
            CORRECTED.fetch_add(1, Ordering::Relaxed);
        } else {
            if grade < Grade::Hit || verdict == Verdict::GoOn {
                log::warn!("machine check on CPU {}: {bank}", cpu.index);
            }
            event(Some(bank), guest.map(|(vm, _)| vm), verdict);
            if let Some(frame) = bank.bad_memory() {
                let known = memory::condemn(frame);
                let what = if known { "not used any more" } else { "one of too many to remember" };
                log::warn!("memory at {:#x} is bad: {what}", frame.as_u64());
            }
        }
        if grade < Grade::Hit || verdict == Verdict::EndVm {
            let _ = write(msr::bank_status(bank.number), 0);
        }
    }
}

fn event(bank: Option<&Bank>, vm: Option<&str>, verdict: Verdict) {
    events::write(percpu::stamp(), "machine-check", |json| {
        if let Some(vm) = vm {
            json.text("vm", vm)?;
        }
        if let Some(bank) = bank {
            json.number("bank", bank.number)?;
            json.address("status", bank.status)?;
            if let Some(address) = bank.address {
                json.address("address", address)?;
            }
        }
        json.text("verdict", verdict)
    });
}

/// Looks for errors that came without a machine check, and counts them. For the end of a run.
pub fn poll(cpu: &PerCpu) {
    let report = report();
    if !report.banks.is_empty() {
        tell(cpu, &report, None);
    }
}

/// Errors that the hardware has corrected, as far as the banks could hold them.
pub fn corrected() -> u64 {
    CORRECTED.load(Ordering::Relaxed)
}
