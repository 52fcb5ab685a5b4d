//! One CPU: its control registers, VMX operation, and what the scheduler keeps for it.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, __cpuid_count};
use core::fmt;

use vmx::addr::HostPhysAddr;
use vmx::capability::{self, Capabilities};
use vmx::instruction::{VmFail, vmxoff, vmxon};
use vmx::msr_policy::msr::PAT;
use vmx::vcpu::HostState;
use x86_64::VirtAddr;
use x86_64::instructions::interrupts;
use x86_64::instructions::port::Port;
use x86_64::instructions::tlb;
use x86_64::registers::control::{Cr0, Cr3, Cr4, Cr4Flags};
use x86_64::registers::model_specific::{Efer, GsBase, Msr};
use x86_64::registers::segmentation::SegmentSelector;

use super::{exceptions, msr, segments::Segments};
use crate::firmware::{self, VmxLock};
use crate::memory;
use crate::mtrr::Mtrrs;
use crate::percpu::PerCpu;

/// IA32_MISC_ENABLE.
const MISC_ENABLE: u32 = 0x1a0;
/// IA32_TSC_ADJUST.
const TSC_ADJUST: u32 = 0x3b;
/// IA32_DEBUGCTL.
const DEBUGCTL: u32 = 0x1d9;

/// Why this CPU cannot run guests. The platform's fault, and something a person can act upon.
#[derive(Debug, Clone, Copy)]
pub enum NoVmx {
    /// CPUID.1:ECX[5] is 0.
    Absent,
    /// IA32_FEATURE_CONTROL is locked without VMX.
    DisabledByFirmware,
    /// IA32_FEATURE_CONTROL is locked with VMX for TXT only.
    OnlyInSmx,
    /// A VMX capability MSR cannot be read.
    Unreadable(u32),
    /// Needed features are missing.
    Lacks(Capabilities),
    /// There is no frame for the VMXON region.
    OutOfMemory,
    /// VMXON failed.
    Vmxon(VmFail),
}

impl fmt::Display for NoVmx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str(
                "no VT-x: this CPU does not have VMX (CPUID.1:ECX[5] is 0). It takes an Intel CPU \
                 with VT-x; under QEMU, KVM with nested VMX and -cpu host",
            ),
            Self::DisabledByFirmware => f.write_str(
                "VT-x is disabled: IA32_FEATURE_CONTROL is locked without VMX. Enable \
                 \"Intel Virtualization Technology\" (VT-x, VMX) in the firmware setup, and switch \
                 the machine off and on",
            ),
            Self::OnlyInSmx => f.write_str(
                "VT-x is kept for Intel TXT: IA32_FEATURE_CONTROL is locked with VMX in SMX \
                 operation only. Disable \"Intel TXT\" (Trusted Execution), or enable \"Intel \
                 Virtualization Technology\" (VT-x, VMX) as well, in the firmware setup, and switch \
                 the machine off and on",
            ),
            Self::Unreadable(number) => write!(f, "VMX capability MSR {number:#x} cannot be read"),
            Self::Lacks(caps) => write!(f, "this CPU's VT-x lacks: {}", caps.missing()),
            Self::OutOfMemory => f.write_str("no memory is left for the VMXON region"),
            Self::Vmxon(fail) => write!(f, "VMXON: {fail}"),
        }
    }
}

/// A CPU in VMX operation.
pub struct Vmx {
    /// Its capabilities.
    pub caps: Capabilities,
    /// What VM exits load.
    pub host: HostState,
    region: HostPhysAddr,
}

/// Masks both interrupt controllers: the hypervisor takes no device's interrupts.
pub fn mask_legacy_interrupts() {
    // SAFETY: the mask registers of the two 8259s; where there are none, nothing happens.
    unsafe {
        Port::<u8>::new(0x21).write(0xff);
        Port::<u8>::new(0xa1).write(0xff);
    }
}

/// The very first on the boot CPU: from here on a fault tells of itself, and MSRs that do not exist
/// can be asked for.
pub fn begin() {
    interrupts::disable();
    // Firmware may have used it; here 0 means that the CPU has no data yet.
    GsBase::write(VirtAddr::zero());
    exceptions::load_early();
    lift_cpuid_limit();
    // Before the framebuffer is written, which the loader maps by an entry that changes.
    // SAFETY: interrupts are off, and so is PGE from here on; nothing else is mapped by it.
    unsafe {
        Cr4::update(|cr4| cr4.remove(Cr4Flags::PAGE_GLOBAL));
        set_pat();
    }
}

/// A setting for an operating system of 1996 hides most of CPUID.
fn lift_cpuid_limit() {
    // SAFETY: reading has no side effect, and all of CPUID is expected to be there.
    unsafe {
        if let Ok(misc) = msr::read(MISC_ENABLE)
            && misc & firmware::MISC_LIMIT_CPUID != 0
        {
            let _ = msr::write(MISC_ENABLE, misc & !firmware::MISC_LIMIT_CPUID);
        }
    }
}

/// This CPU's MTRRs; `None` without them, or if they cannot be read.
pub fn mtrrs() -> Option<Mtrrs> {
    let has_mtrrs = __cpuid(1).edx & 1 << 12 != 0;
    let width =
        if __cpuid(0x8000_0000).eax >= 0x8000_0008 { __cpuid(0x8000_0008).eax & 0xff } else { 36 };
    // SAFETY: reading them has no side effect.
    has_mtrrs.then(|| Mtrrs::read(width, |number| unsafe { msr::read(number) }.ok()))?
}

/// Brings this CPU's tables and registers into the state that the hypervisor runs in, whatever the
/// firmware has left; `None` without memory.
pub fn initialize() -> Option<(Segments, u64)> {
    let segments = Segments::load()?;
    let idt = exceptions::load(segments.cs);
    lift_cpuid_limit();
    let has_xsave = __cpuid(1).ecx & 1 << 26 != 0;
    // SAFETY: kernel text is read-only and never written (WP); there is an x87 and SSE2 on every
    // x86-64 CPU; a #MC handler is in place (MCE); paging stays as it is (LA57, NXE). CET goes
    // before CR0 is written, which it would hold WP in.
    unsafe {
        Cr4::write_raw(firmware::cr4(Cr4::read_raw(), has_xsave));
        Cr0::write_raw(firmware::CR0);
        Efer::write_raw(firmware::EFER);
        asm!("mov dr7, {}", in(reg) firmware::DR7, options(nomem, nostack, preserves_flags));
        let _ = msr::write(DEBUGCTL, 0);
        set_pat();
    }
    Some((segments, idt))
}

/// Sets IA32_PAT as all CPUs have it: SDM volume 3, section "Programming the PAT", which wants what
/// MTRRs want (section "MTRR Considerations in MP Systems").
///
/// # Safety
///
/// Interrupts are off, as is CR4.PGE; nothing is mapped by an entry that changes, unless it is for
/// the new type.
unsafe fn set_pat() {
    // SAFETY: PAT exists on every x86-64 CPU; no memory changes its type while a cache or the TLB
    // knows of the old one, as the caches are off and empty when it is written.
    unsafe {
        if msr::read(PAT) == Ok(firmware::PAT) {
            return;
        }
        Cr0::write_raw(firmware::CR0 | firmware::CR0_CD);
        wbinvd();
        tlb::flush_all();
        let _ = msr::write(PAT, firmware::PAT);
        wbinvd();
        tlb::flush_all();
        Cr0::write_raw(firmware::CR0);
    }
}

/// Writes all caches of this CPU back and empties them.
fn wbinvd() {
    // SAFETY: it takes time and does nothing else; the hypervisor runs at CPL 0.
    unsafe { asm!("wbinvd", options(nostack, preserves_flags)) };
}

/// IA32_TSC_ADJUST, by which firmware may have put this CPU's time-stamp counter off the others'.
pub fn tsc_adjust() -> Option<u64> {
    let has_adjust = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ebx & 1 << 1 != 0;
    // SAFETY: reading it has no side effect.
    has_adjust.then(|| unsafe { msr::read(TSC_ADJUST) }.ok())?
}

/// Makes it what the boot CPU has: times are compared between CPUs.
pub fn set_tsc_adjust(wanted: Option<u64>) {
    if let (Some(found), Some(wanted)) = (tsc_adjust(), wanted)
        && found != wanted
    {
        log::warn!("a time-stamp counter was {:#x} off", found.wrapping_sub(wanted));
        // SAFETY: nobody has looked at this CPU's clock yet.
        unsafe {
            let _ = msr::write(TSC_ADJUST, wanted);
        }
    }
}

/// Whether CPUID announces IA32_CORE_CAPABILITIES.
pub fn announces_core_capabilities() -> bool {
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & sld::CPUID_CORE_CAPABILITIES != 0
}

/// Enters VMX operation on this CPU.
///
/// # Errors
///
/// [`NoVmx`].
pub fn enter_vmx(cpu: &'static PerCpu, segments: &Segments, idt_base: u64) -> Result<Vmx, NoVmx> {
    if __cpuid(1).ecx & 1 << 5 == 0 {
        return Err(NoVmx::Absent);
    }
    let number = capability::msr::FEATURE_CONTROL;
    // SAFETY: reading has no side effect; writing locks VMX on, which is what it is for.
    unsafe {
        match VmxLock::of(msr::read(number).map_err(|_| NoVmx::Unreadable(number))?) {
            VmxLock::On => {}
            VmxLock::Open(on) => {
                msr::write(number, on).map_err(|_| NoVmx::DisabledByFirmware)?;
            }
            VmxLock::Off => return Err(NoVmx::DisabledByFirmware),
            VmxLock::OnlyInSmx => return Err(NoVmx::OnlyInSmx),
        }
    }
    // SAFETY: capability MSRs have no side effect.
    let caps = Capabilities::read(|number| unsafe { msr::read(number) })
        .map_err(|(number, _)| NoVmx::Unreadable(number))?;
    if !caps.missing().is_empty() {
        return Err(NoVmx::Lacks(caps));
    }
    let region = vmcs_region(&caps).ok_or(NoVmx::OutOfMemory)?;
    // SAFETY: VMX exists; the fixed bits are those that VMXON demands, and the region is this
    // CPU's own.
    unsafe {
        Cr0::write_raw((Cr0::read_raw() | caps.cr0_fixed0) & caps.cr0_fixed1);
        Cr4::update(|cr4| cr4.insert(Cr4Flags::VIRTUAL_MACHINE_EXTENSIONS));
        vmxon(region).map_err(NoVmx::Vmxon)?;
    }
    Ok(Vmx { caps, host: host_state(cpu, segments, idt_base), region })
}

impl Vmx {
    /// Leaves VMX operation.
    pub fn leave(self) {
        // SAFETY: every vCPU has been cleared: the scheduler owns `self` and does so first.
        if let Err(fail) = unsafe { vmxoff() } {
            log::error!("VMXOFF: {fail}");
        }
        memory::free_frame(self.region);
    }
}

/// A VMXON or VMCS region: a frame that starts with the revision identifier.
pub fn vmcs_region(caps: &Capabilities) -> Option<HostPhysAddr> {
    let region = memory::allocate_frame()?;
    // SAFETY: a frame of our own, not yet known to the CPU.
    unsafe { memory::to_virtual::<u32>(region).write(caps.revision()) };
    Some(region)
}

fn host_state(cpu: &'static PerCpu, segments: &Segments, idt_base: u64) -> HostState {
    let SegmentSelector(cs) = segments.cs;
    HostState {
        cpu: cpu.index,
        kicked: &cpu.kicked,
        cr0: Cr0::read_raw(),
        cr3: Cr3::read_raw().0.start_address().as_u64() | u64::from(Cr3::read_raw().1),
        cr4: Cr4::read_raw(),
        efer: Efer::read_raw(),
        // SAFETY: PAT exists on every x86-64 CPU, and reading it has no side effect.
        pat: unsafe { Msr::new(PAT).read() },
        cs,
        ss: segments.ss.0,
        tr: segments.tr.0,
        tr_base: segments.tss_base,
        gdt_base: segments.gdt_base,
        idt_base,
        gs_base: GsBase::read().as_u64(),
    }
}
