//! One CPU: its control registers, VMX operation, and what the scheduler keeps for it.

use core::fmt;

use vmx::addr::HostPhysAddr;
use vmx::capability::{self, Capabilities};
use vmx::instruction::{VmFail, vmxoff, vmxon};
use vmx::msr_policy::msr::PAT;
use vmx::vcpu::HostState;
use x86_64::instructions::port::Port;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr3, Cr4, Cr4Flags};
use x86_64::registers::model_specific::{Efer, GsBase, Msr};
use x86_64::registers::segmentation::SegmentSelector;

use super::{exceptions, msr, segments::Segments};
use crate::memory;
use crate::percpu::PerCpu;

/// IA32_FEATURE_CONTROL: the value is locked until reset.
const FEATURE_CONTROL_LOCK: u64 = 1 << 0;
/// IA32_FEATURE_CONTROL: VMXON is allowed outside SMX operation.
const FEATURE_CONTROL_VMXON: u64 = 1 << 2;

/// Why this CPU cannot run guests. The platform's fault, and something a person can act upon.
#[derive(Debug, Clone, Copy)]
pub enum NoVmx {
    /// CPUID.1:ECX[5] is 0.
    Absent,
    /// IA32_FEATURE_CONTROL is locked without VMX.
    DisabledByFirmware,
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
                 \"Intel Virtualization Technology\" (VT-x, VMX) in the firmware setup",
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

/// Brings this CPU's tables and control registers into the state that the hypervisor runs in;
/// `None` without memory.
pub fn initialize() -> Option<(Segments, u64)> {
    let segments = Segments::load()?;
    let idt = exceptions::load(segments.cs);
    let has_xsave = core::arch::x86_64::__cpuid(1).ecx & 1 << 26 != 0;
    // SAFETY: kernel text is read-only and never written (WP); there is an x87 and SSE2 on every
    // x86-64 CPU; a #MC handler is in place (MCE).
    unsafe {
        Cr0::update(|cr0| {
            cr0.remove(Cr0Flags::EMULATE_COPROCESSOR | Cr0Flags::TASK_SWITCHED);
            cr0.remove(Cr0Flags::CACHE_DISABLE | Cr0Flags::NOT_WRITE_THROUGH);
            cr0.insert(Cr0Flags::WRITE_PROTECT | Cr0Flags::NUMERIC_ERROR);
            cr0.insert(Cr0Flags::MONITOR_COPROCESSOR);
        });
        Cr4::update(|cr4| {
            cr4.insert(Cr4Flags::OSFXSR | Cr4Flags::OSXMMEXCPT_ENABLE);
            cr4.insert(Cr4Flags::MACHINE_CHECK_EXCEPTION);
            if has_xsave {
                cr4.insert(Cr4Flags::OSXSAVE);
            }
        });
    }
    Some((segments, idt))
}

/// Enters VMX operation on this CPU.
///
/// # Errors
///
/// [`NoVmx`].
pub fn enter_vmx(cpu: &'static PerCpu, segments: &Segments, idt_base: u64) -> Result<Vmx, NoVmx> {
    if core::arch::x86_64::__cpuid(1).ecx & 1 << 5 == 0 {
        return Err(NoVmx::Absent);
    }
    let number = capability::msr::FEATURE_CONTROL;
    // SAFETY: reading has no side effect; writing locks VMX on, which is what it is for.
    unsafe {
        let control = msr::read(number).map_err(|_| NoVmx::Unreadable(number))?;
        if control & FEATURE_CONTROL_LOCK == 0 {
            let on = control | FEATURE_CONTROL_LOCK | FEATURE_CONTROL_VMXON;
            msr::write(number, on).map_err(|_| NoVmx::DisabledByFirmware)?;
        } else if control & FEATURE_CONTROL_VMXON == 0 {
            return Err(NoVmx::DisabledByFirmware);
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
