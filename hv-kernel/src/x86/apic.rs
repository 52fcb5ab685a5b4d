//! The local APIC of a CPU: its ID, interprocessor interrupts, and the timer that ends a sleep.
//!
//! x2APIC mode where the CPU has it, else the memory-mapped registers. Source: SDM volume 3, chapter
//! "Advanced Programmable Interrupt Controller (APIC)".

use core::arch::x86_64::__cpuid;

use vmx::addr::HostPhysAddr;

use super::msr;
use crate::firmware::{self, APIC_X2APIC};
use crate::memory;

/// The vector of the timer.
pub const TIMER_VECTOR: u8 = 0xf0;
/// The vector of an interrupt that has gone away meanwhile.
pub const SPURIOUS_VECTOR: u8 = 0xff;

/// IA32_APIC_BASE.
const APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_APIC_BASE: the address.
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// MSR of register 0 in x2APIC mode; a register's MSR is its offset in memory divided by 16 higher.
const X2APIC_BASE: u32 = 0x800;

/// Registers, by their offset in memory.
mod register {
    pub const ID: u32 = 0x20;
    pub const VERSION: u32 = 0x30;
    pub const TPR: u32 = 0x80;
    pub const EOI: u32 = 0xb0;
    pub const SVR: u32 = 0xf0;
    pub const ICR: u32 = 0x300;
    pub const ICR_HIGH: u32 = 0x310;
    pub const LVT_TIMER: u32 = 0x320;
    /// Thermal sensor, performance counters, LINT0, errors. LINT1 is NMI, which is always taken.
    pub const LVT_OTHERS: [u32; 4] = [0x330, 0x340, 0x350, 0x370];
    /// Corrected machine checks: there, if there are seven entries.
    pub const LVT_CMCI: u32 = 0x2f0;
}

/// CPUID.1:ECX: x2APIC mode.
const HAS_X2APIC: u32 = 1 << 21;
/// CPUID.1:ECX: the timer's TSC-deadline mode.
const HAS_DEADLINE: u32 = 1 << 24;

/// SVR: the APIC is enabled by software.
const SVR_ENABLED: u32 = 1 << 8;
/// LVT timer: TSC-deadline mode.
const LVT_TSC_DEADLINE: u32 = 1 << 18;
/// LVT: masked.
const LVT_MASKED: u32 = 1 << 16;
/// ICR: not sent yet; memory-mapped registers only.
const ICR_PENDING: u32 = 1 << 12;
/// ICR: level "assert".
const ICR_ASSERT: u32 = 1 << 14;

/// What is sent to another CPU.
#[derive(Debug, Clone, Copy)]
pub enum Ipi {
    /// An NMI.
    Nmi,
    /// INIT.
    Init,
    /// Start-up, at this page below 1 MiB.
    Startup(u8),
}

impl Ipi {
    /// The lower half of ICR.
    const fn command(self) -> u32 {
        ICR_ASSERT
            | match self {
                Self::Nmi => 4 << 8,
                Self::Init => 5 << 8,
                Self::Startup(page) => 6 << 8 | page as u32,
            }
    }
}

/// How this CPU's APIC is reached.
#[derive(Debug, Clone, Copy)]
enum Access {
    Msr,
    Memory(u64),
}

/// A CPU's own local APIC.
#[derive(Debug, Clone, Copy)]
pub struct LocalApic {
    access: Access,
    /// There is a timer in TSC-deadline mode.
    has_deadline: bool,
}

impl LocalApic {
    /// This CPU's APIC, which [`Self::start`] has switched on.
    pub fn current() -> Self {
        let features = __cpuid(1).ecx;
        // SAFETY: every x86-64 CPU with VMX has this MSR.
        let base = unsafe { msr::read(APIC_BASE) }.unwrap_or(0);
        let access =
            if base & APIC_X2APIC != 0 { Access::Msr } else { Access::Memory(base & BASE_ADDRESS) };
        Self { access, has_deadline: features & HAS_DEADLINE != 0 }
    }

    /// Switches this CPU's APIC on, with all its own interrupt sources masked.
    pub fn start() -> Self {
        let features = __cpuid(1).ecx;
        // SAFETY: every x86-64 CPU with VMX has this MSR.
        let base = unsafe { msr::read(APIC_BASE) }.unwrap_or(0xfee0_0000);
        for value in firmware::apic_steps(base, features & HAS_X2APIC != 0).into_iter().flatten() {
            // SAFETY: switches the APIC on; nothing relies on it yet.
            unsafe {
                let _ = msr::write(APIC_BASE, value);
            }
        }
        let apic = Self::current();
        apic.write(register::SVR, SVR_ENABLED | u32::from(SPURIOUS_VECTOR));
        // Nothing is held back.
        apic.write(register::TPR, 0);
        register::LVT_OTHERS.into_iter().for_each(|entry| apic.write(entry, LVT_MASKED));
        if apic.read(register::VERSION) >> 16 & 0xff >= 6 {
            apic.write(register::LVT_CMCI, LVT_MASKED);
        }
        apic.write(
            register::LVT_TIMER,
            u32::from(TIMER_VECTOR) | if apic.has_deadline { LVT_TSC_DEADLINE } else { LVT_MASKED },
        );
        apic
    }

    fn read(self, register: u32) -> u32 {
        match self.access {
            // SAFETY: the register exists and reading it has no side effect.
            Access::Msr => unsafe { msr::read(X2APIC_BASE + register / 16) }.unwrap_or(0) as u32,
            Access::Memory(base) => {
                // SAFETY: the page is this CPU's APIC, which the loader maps with all below 4 GiB.
                unsafe { at(base, register).read_volatile() }
            }
        }
    }

    fn write(self, register: u32, value: u32) {
        match self.access {
            // SAFETY: the register exists, and the value is one of this module's.
            Access::Msr => unsafe {
                let _ = msr::write(X2APIC_BASE + register / 16, value.into());
            },
            // SAFETY: as for `read`.
            Access::Memory(base) => unsafe { at(base, register).write_volatile(value) },
        }
    }

    /// This CPU's APIC ID.
    pub fn id(self) -> u32 {
        let id = self.read(register::ID);
        if matches!(self.access, Access::Msr) { id } else { id >> 24 }
    }

    /// Whether a CPU with this APIC ID can be reached: memory-mapped registers have 8 bits for it, of
    /// which all ones mean everybody.
    pub const fn reaches(self, target: u32) -> bool {
        matches!(self.access, Access::Msr) || target < 0xff
    }

    /// Sends an interprocessor interrupt to the CPU with this APIC ID. What was written before can
    /// be seen there.
    pub fn send(self, target: u32, ipi: Ipi) {
        match self.access {
            Access::Msr => {
                // WRMSR to the APIC does not wait for stores: section "MSR Access in x2APIC Mode".
                core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
                // SAFETY: LFENCE only waits; the command is one of `Ipi`.
                unsafe {
                    core::arch::x86_64::_mm_lfence();
                    let command = u64::from(target) << 32 | u64::from(ipi.command());
                    let _ = msr::write(X2APIC_BASE + register::ICR / 16, command);
                }
            }
            Access::Memory(_) => {
                while self.read(register::ICR) & ICR_PENDING != 0 {
                    core::hint::spin_loop();
                }
                self.write(register::ICR_HIGH, target << 24);
                self.write(register::ICR, ipi.command());
            }
        }
    }

    /// The interrupt that is being handled is done.
    pub fn end_of_interrupt(self) {
        self.write(register::EOI, 0);
    }

    /// Has the timer interrupt this CPU at `deadline`, in the TSC; never with `None`. False where
    /// there is no such timer.
    pub fn set_deadline(self, deadline: Option<u64>) -> bool {
        if self.has_deadline {
            // 0 disarms it.
            let deadline = deadline.map_or(0, |deadline| deadline.max(1));
            // SAFETY: CPUID says that the MSR exists; the interrupt has a handler.
            unsafe {
                let _ = msr::write(TSC_DEADLINE, deadline);
            }
        }
        self.has_deadline
    }
}

fn at(base: u64, register: u32) -> *mut u32 {
    memory::to_virtual(HostPhysAddr::new_truncate(base + u64::from(register)))
}
