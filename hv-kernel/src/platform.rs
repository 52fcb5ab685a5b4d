//! What the platform does behind the hypervisor's back: NMIs that nobody here has sent, system-management
//! interrupts, machine checks of other CPUs.

use core::arch::x86_64::__cpuid;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use x86_64::instructions::port::Port;

use crate::percpu::{self, PerCpu};
use crate::x86::{mca, msr};

/// How many lines are written about NMIs. All are counted.
const MAX_LINES: u32 = 16;
/// Lines that may still be written.
static LINES_LEFT: AtomicU32 = AtomicU32::new(MAX_LINES);

/// MSR_SMI_COUNT, on Intel's CPUs since Nehalem.
const SMI_COUNT: u32 = 0x34;
/// What it was at the start; all ones where there is none.
static SMIS_BEFORE: AtomicU64 = AtomicU64::new(u64::MAX);

/// System control port B. Bit 7: NMI by SERR#, switched off and cleared by bit 2. Bit 6: NMI by IOCHK#,
/// the same by bit 3. Chipset manuals, "NMI Status and Control Register (NMI_STS_CNT)".
const CONTROL_B: u16 = 0x61;

/// A CPU's handlers have left something to tell.
#[cold]
pub fn tell(cpu: &PerCpu) {
    let (nmis, machine_check) = cpu.notices.take();
    if machine_check {
        mca::tell_passed(cpu);
    }
    let take = |left: u32| left.checked_sub(1);
    if nmis > 0 && LINES_LEFT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
        log::warn!(
            "CPU {}: an NMI that the hypervisor has not sent, {nmis} so far there: {}",
            cpu.index,
            source()
        );
    }
}

/// Who says that it has raised an NMI. It is not heard any more: a line that stays asserted would raise
/// them without end.
fn source() -> &'static str {
    let mut port = Port::<u8>::new(CONTROL_B);
    // SAFETY: reading has no side effect; bits 1:0 (speaker) are written as they were, bits 2 and 3
    // switch off what has spoken.
    unsafe {
        let status = port.read();
        let [system_error, io_check] = [status & 1 << 7 != 0, status & 1 << 6 != 0];
        let off = u8::from(system_error) << 2 | u8::from(io_check) << 3;
        if off != 0 {
            port.write(status & 0x0f | off);
        }
        match (system_error, io_check) {
            (true, _) => "the chipset reports a system error (SERR#, PCI)",
            (false, true) => "the chipset reports an I/O check (IOCHK#)",
            (false, false) => "a watchdog or a button, perhaps",
        }
    }
}

fn smis() -> Option<u64> {
    // GenuineIntel, family 6.
    let [vendor, version] = [0, 1].map(__cpuid);
    let intel = [vendor.ebx, vendor.edx, vendor.ecx] == [0x756e_6547, 0x4965_6e69, 0x6c65_746e];
    // SAFETY: reading it has no side effect.
    let count = || unsafe { msr::read(SMI_COUNT) }.ok();
    (intel && version.eax >> 8 & 0xf == 6).then(count)?.map(|count| count & 0xffff_ffff)
}

/// The run begins.
pub fn start() {
    SMIS_BEFORE.store(smis().unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// The run is over: tells what was counted.
pub fn finish() {
    let before = SMIS_BEFORE.load(Ordering::Relaxed);
    if before != u64::MAX
        && let Some(after) = smis()
    {
        let count = after.wrapping_sub(before) & 0xffff_ffff;
        log::info!("{count} system-management interrupts during the run");
    }
    let nmis = percpu::unknown_nmis();
    if nmis > 0 {
        log::warn!("{nmis} NMIs that the hypervisor has not sent");
    }
    let corrected = mca::corrected();
    if corrected > 0 {
        log::warn!("{corrected} errors that the hardware has corrected (machine-check banks)");
    }
}
