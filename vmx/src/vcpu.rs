//! A virtual CPU: its VMCS, the registers outside of it, and its way onto a CPU and off again.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

use bitflags::bitflags;
use x86_64::registers::model_specific::Msr;

use crate::addr::HostPhysAddr;
use crate::apic::LocalApic;
use crate::bus_lock;
use crate::capability::Capabilities;
use crate::controls::Secondary;
use crate::cpuid::CpuidTable;
use crate::exit::BasicReason;
use crate::fields::*;
use crate::instruction::{CurrentVmcs, VmFail, invvpid_single_context, vmclear, vmptrld};
use crate::msr_policy::msr;
use crate::run::AcPlace;
use crate::setup::{self, Cr4, Pointers};
use crate::split_lock::AcReport;
use crate::world::{GuestState, register, vmx_exit_entry};
use crate::xstate::{self, XArea};

/// What of the host a VM exit loads: SDM volume 3, section "Host-State Area". Each CPU has one.
#[derive(Debug, Clone, Copy)]
pub struct HostState {
    /// The CPU's index. Two states of one index are the same state.
    pub cpu: u32,
    /// Set by this CPU's NMI handler, which also makes the VMX-preemption timer of the current
    /// VMCS expire ([`crate::instruction::expire_preemption_timer`]): somebody has something for
    /// the vCPU that is loaded here, or for the CPU.
    pub kicked: &'static AtomicBool,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// CS selector.
    pub cs: u16,
    /// SS, DS and ES selector.
    pub ss: u16,
    /// TR selector.
    pub tr: u16,
    /// Linear address of the TSS.
    pub tr_base: u64,
    /// Linear address of the GDT.
    pub gdt_base: u64,
    /// Linear address of the IDT.
    pub idt_base: u64,
    /// GS base: per-CPU data.
    pub gs_base: u64,
}

/// How often each thing happened to a vCPU.
#[derive(Debug, Clone)]
pub struct Counters {
    /// VM exits by basic reason; those above the table in the last place.
    pub exits: [u64; Self::REASONS],
    /// Bus locks that the CPU told of: [`crate::bus_lock`].
    pub bus_locks: u64,
}

impl Counters {
    /// Reasons counted apart, plus one place for all others.
    pub const REASONS: usize = 80;

    /// Nothing has happened.
    pub const NONE: Self = Self { exits: [0; Self::REASONS], bus_locks: 0 };

    /// Counts one exit.
    #[inline(always)]
    pub fn count(&mut self, reason: BasicReason) {
        self.exits[usize::from(reason.0).min(Self::REASONS - 1)] += 1;
    }

    /// The reasons that occurred, with their counts.
    pub fn exits(&self) -> impl Iterator<Item = (BasicReason, u64)> {
        (0u16..).zip(self.exits).filter(|row| row.1 != 0).map(|(n, count)| (BasicReason(n), count))
    }
}

/// MSRs that guests use freely and that neither VM entry nor exit switches. The hypervisor itself
/// does not use them, so they change hands with the vCPU only.
const SWITCHED_MSRS: [u32; 6] =
    [msr::STAR, msr::LSTAR, msr::CSTAR, msr::FMASK, msr::KERNEL_GS_BASE, msr::TSC_AUX];

/// Which of them this CPU has: the last one comes with RDTSCP.
const fn switched_msrs(caps: &Capabilities) -> usize {
    SWITCHED_MSRS.len() - !caps.has_secondary(Secondary::ENABLE_RDTSCP) as usize
}

/// Registers that change hands when a vCPU is loaded or put.
#[derive(Debug)]
struct Switched {
    xarea: XArea,
    /// The guest's XCR0.
    xcr0: u64,
    cr2: u64,
    dr: [u64; 4],
    dr6: u64,
    msrs: [u64; SWITCHED_MSRS.len()],
}

impl Switched {
    const fn reset() -> Self {
        Self {
            xarea: XArea::reset(),
            xcr0: xstate::X87,
            cr2: 0,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            msrs: [0; SWITCHED_MSRS.len()],
        }
    }

    /// # Safety
    ///
    /// At CPL 0, on the CPU that is to run the vCPU, with nothing of the host in these registers.
    unsafe fn restore(&self, xmask: u64, msrs: usize) {
        // SAFETY: (1) `xmask` is this CPU's, and XCR0 was checked against it; (2) the debug registers
        // are inert in the host, whose DR7 is 0x400 after every exit; (3) the MSRs exist (`msrs`), and
        // hold values that the guest's own WRMSR accepted.
        unsafe {
            self.xarea.restore(xmask, self.xcr0);
            asm!("mov cr2, {}", in(reg) self.cr2, options(nostack));
            asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}", "mov dr6, {}",
                 in(reg) self.dr[0], in(reg) self.dr[1], in(reg) self.dr[2], in(reg) self.dr[3],
                 in(reg) self.dr6, options(nostack));
            for (number, value) in SWITCHED_MSRS.into_iter().zip(self.msrs).take(msrs) {
                Msr::new(number).write(value);
            }
        }
    }

    /// # Safety
    ///
    /// At CPL 0, on the CPU that ran the vCPU last, before anything else changes the registers.
    unsafe fn save(&mut self, xmask: u64, msrs: usize) {
        // SAFETY: reads, and one store into an area that is large enough for `xmask`.
        unsafe {
            self.xarea.save(xmask);
            asm!("mov {}, cr2", out(reg) self.cr2, options(nostack));
            asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3", "mov {}, dr6",
                 out(reg) self.dr[0], out(reg) self.dr[1], out(reg) self.dr[2],
                 out(reg) self.dr[3], out(reg) self.dr6, options(nostack));
            for (number, value) in SWITCHED_MSRS.into_iter().zip(&mut self.msrs).take(msrs) {
                *value = Msr::new(number).read();
            }
        }
    }
}

/// A virtual CPU.
///
/// It is in one of three states: *clear* (the VMCS is in memory, and any CPU may load it), *loaded*
/// on one CPU ([`Self::load`] gives a [`Loaded`], which alone can run it), or *put* there: the VMCS
/// is still that CPU's, until [`Self::clear`].
#[derive(Debug)]
pub struct Vcpu {
    pub(crate) state: GuestState,
    pub(crate) sld: sld::Vcpu,
    pub(crate) source: sld::Source,
    pub(crate) cpuid: CpuidTable,
    pub(crate) cr4: Cr4,
    /// Its local APIC, which holds the interrupts that wait for the guest to be able to take them.
    pub(crate) apic: LocalApic,
    /// Whether it executes instructions.
    pub(crate) activity: Activity,
    /// The next VM entry is for one instruction; nothing may end the turn before the exit after it,
    /// unless it is only traced.
    pub(crate) step: Step,
    /// The #AC for which there is, or is to be, a step.
    pub(crate) stepped: Option<AcReport>,
    /// The guest's TSC less the host's.
    pub(crate) tsc_offset: u64,
    /// When its turn is over or its timer is due, in the host's TSC.
    pub(crate) attention_at: u64,
    /// When its turn is over, in the host's TSC.
    pub(crate) stop_at: u64,
    /// When its turn is over or its timer is due, even if something else wants attention before.
    pub(crate) due_at: u64,
    /// Where its last #AC came from.
    pub(crate) ac_place: Option<AcPlace>,
    /// It took the bus, as an exit said, and that is not yet one of those that its VM may have.
    pub(crate) bus_locked: bool,
    /// An NMI that waits for the guest to be able to take it.
    pub(crate) pending_nmi: bool,
    /// How often each thing happened.
    pub counters: Counters,
    caps: Capabilities,
    region: HostPhysAddr,
    switched: Switched,
    /// The CPU whose host state the VMCS holds.
    host: Option<u32>,
    start: Option<Start>,
}

/// Whether a vCPU executes instructions, and if not, what ends that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activity {
    /// It does.
    Active,
    /// It has executed HLT: an interrupt, an NMI or INIT.
    Halted,
    /// It has been reset by INIT and is not the one that starts the VM: SIPI.
    WaitForSipi,
}

bitflags! {
    /// Why the next VM entry is for one instruction, by monitor trap flag.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Step: u8 {
        /// Something stands where the guest has no memory.
        const HOLE = 1 << 0;
        /// Split-lock detection is off.
        const SPLIT_LOCK = 1 << 1;
        /// It is to be switched off: the monitor trap flag is not on for that yet.
        const WANTED = 1 << 2;
        /// It was switched off just now: the VM entry for the step is still to come.
        const BEGUN = 1 << 3;
        /// Not for one alone: each instruction is looked at before it is executed, and all are stepped.
        const TRACE = 1 << 4;
        /// For what the next VM entry is for one instruction.
        const ONE = Self::HOLE.bits() | Self::SPLIT_LOCK.bits() | Self::WANTED.bits();
        /// For what the monitor trap flag is on.
        const TRAP = Self::HOLE.bits() | Self::SPLIT_LOCK.bits() | Self::TRACE.bits();
    }
}

/// Where a vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// In flat 32-bit protected mode with paging off, at this address.
    Protected {
        /// RIP.
        rip: u32,
    },
    /// It waits for a SIPI of another vCPU.
    WaitForSipi,
}

/// How many guest-state fields can be overridden.
pub const MAX_OVERRIDES: usize = 8;

/// What the VMCS is filled with at the first load.
#[derive(Debug)]
struct Start {
    pointers: Pointers,
    origin: Origin,
    overrides: [Option<(GuestField, u64)>; MAX_OVERRIDES],
}

/// What a vCPU is made of.
#[derive(Debug)]
pub struct VcpuConfig {
    /// The CPU's capabilities.
    pub caps: Capabilities,
    /// A VMCS region, see [`Vcpu::new`].
    pub region: HostPhysAddr,
    /// What the VMCS points to.
    pub pointers: Pointers,
    /// The guest's CPUID.
    pub cpuid: CpuidTable,
    /// Split-lock detection as this vCPU sees it.
    pub sld: sld::Vcpu,
    /// Where its split locks are detected: any but [`sld::Source::Auto`].
    pub source: sld::Source,
    /// Its local APIC's ID.
    pub apic_id: u32,
    /// Where it starts.
    pub origin: Origin,
    /// Guest-state fields that are to have other values at the start: to try what VM entry says.
    pub overrides: [Option<(GuestField, u64)>; MAX_OVERRIDES],
}

impl Vcpu {
    /// A vCPU that has not run yet.
    ///
    /// # Safety
    ///
    /// The page at `region` is the vCPU's own for its whole life, and starts with the revision
    /// identifier of [`Capabilities::revision`]; the structures that `pointers` names outlive it.
    pub unsafe fn new(config: VcpuConfig) -> Self {
        let mut state = GuestState::new();
        if config.origin == Origin::WaitForSipi {
            state.registers[register::RDX] = config.cpuid.answer(1, 0).eax.into();
        }
        Self {
            state,
            sld: config.sld,
            source: config.source,
            cr4: Cr4 { allowed: config.cpuid.cr4_allowed() },
            cpuid: config.cpuid,
            apic: LocalApic::new(config.apic_id),
            activity: match config.origin {
                Origin::Protected { .. } => Activity::Active,
                Origin::WaitForSipi => Activity::WaitForSipi,
            },
            step: Step::empty(),
            stepped: None,
            tsc_offset: 0,
            attention_at: 0,
            stop_at: 0,
            due_at: 0,
            bus_locked: false,
            pending_nmi: false,
            ac_place: None,
            counters: Counters::NONE,
            caps: config.caps,
            region: config.region,
            switched: Switched::reset(),
            host: None,
            start: Some(Start {
                pointers: config.pointers,
                origin: config.origin,
                overrides: config.overrides,
            }),
        }
    }

    /// Sets a general-purpose register before the first run. `index` as in
    /// [`GuestState::registers`], not RSP's.
    pub fn set_register(&mut self, index: usize, value: u64) {
        assert_ne!(index, register::RSP, "the guest's RSP is in the VMCS");
        self.state.registers[index] = value;
    }

    /// Makes the vCPU this CPU's. The guest's registers are in the CPU from now on.
    ///
    /// # Errors
    ///
    /// VMfail of VMCLEAR or VMPTRLD.
    ///
    /// # Safety
    ///
    /// In VMX root operation with interrupts off; no vCPU is loaded on this CPU and this one is
    /// loaded on no other; `host` describes this CPU.
    pub unsafe fn load(&mut self, host: &HostState) -> Result<Loaded<'_>, VmFail> {
        // SAFETY: the region is this vCPU's own (contract of `new`) and active nowhere else.
        let mut vmcs = unsafe {
            if self.start.is_some() {
                vmclear(self.region)?;
            }
            vmptrld(self.region)?;
            CurrentVmcs::assume()
        };
        if let Some(Start { pointers, origin, overrides }) = self.start.take() {
            setup::initialize(&mut vmcs, &self.caps, &pointers, &self.cr4);
            if bus_lock::wanted(self.sld.vm(), &self.caps) {
                let controls = vmcs.read(SECONDARY_CONTROLS);
                vmcs.write(SECONDARY_CONTROLS, controls | Secondary::BUS_LOCK_DETECTION.bits());
            }
            if let Origin::Protected { rip } = origin {
                setup::flat_protected(&mut vmcs, rip);
            }
            for (field, value) in overrides.into_iter().flatten() {
                vmcs.write_guest(field, value)?;
            }
        }
        if self.host != Some(host.cpu) {
            write_host_state(&mut vmcs, host);
            // What this CPU remembers of the guest's translations is from before it was elsewhere,
            // where the guest's INVLPG did not reach it.
            // SAFETY: a current VMCS proves VMX root operation.
            unsafe { invvpid_single_context(vmcs.read(VPID)) }?;
            self.host = Some(host.cpu);
        }
        // SAFETY: nothing of the host is in these registers (caller).
        unsafe { self.switched.restore(self.cpuid.xstate().mask, switched_msrs(&self.caps)) };
        Ok(Loaded { vcpu: self, vmcs, kicked: host.kicked })
    }
}

/// Writes the host-state area. HOST_RSP is the world switch's.
fn write_host_state(vmcs: &mut CurrentVmcs, host: &HostState) {
    vmcs.write(HOST_CR0, host.cr0);
    vmcs.write(HOST_CR3, host.cr3);
    vmcs.write(HOST_CR4, host.cr4);
    vmcs.write(HOST_IA32_EFER, host.efer);
    vmcs.write(HOST_IA32_PAT, host.pat);
    vmcs.write(HOST_CS_SELECTOR, host.cs);
    for field in [HOST_SS_SELECTOR, HOST_DS_SELECTOR, HOST_ES_SELECTOR] {
        vmcs.write(field, host.ss);
    }
    for field in [HOST_FS_SELECTOR, HOST_GS_SELECTOR] {
        vmcs.write(field, 0);
    }
    vmcs.write(HOST_TR_SELECTOR, host.tr);
    vmcs.write(HOST_TR_BASE, host.tr_base);
    vmcs.write(HOST_GDTR_BASE, host.gdt_base);
    vmcs.write(HOST_IDTR_BASE, host.idt_base);
    vmcs.write(HOST_FS_BASE, 0);
    vmcs.write(HOST_GS_BASE, host.gs_base);
    vmcs.write(HOST_SYSENTER_CS, 0);
    vmcs.write(HOST_SYSENTER_ESP, 0);
    vmcs.write(HOST_SYSENTER_EIP, 0);
    vmcs.write(HOST_RIP, vmx_exit_entry as *const () as u64);
}

/// A vCPU on a CPU: what [`Vcpu::load`] gives.
#[derive(Debug)]
pub struct Loaded<'a> {
    pub(crate) vcpu: &'a mut Vcpu,
    pub(crate) vmcs: CurrentVmcs,
    kicked: &'static AtomicBool,
}

impl Loaded<'_> {
    /// Takes the guest's registers out of the CPU. The VMCS stays active on this CPU, which makes
    /// the next load here cheap; [`Vcpu::clear`] ends that.
    pub fn put(self) {
        // SAFETY: the vCPU is loaded here, and hypervisor code leaves these registers alone.
        unsafe {
            let msrs = switched_msrs(&self.vcpu.caps);
            self.vcpu.switched.save(self.vcpu.cpuid.xstate().mask, msrs);
        }
    }

    /// Whether this CPU was kicked since [`Self::take_kick`].
    pub(crate) fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::Relaxed)
    }

    /// From now on, a kick is a new one. What kicks are about must be looked at after this: the
    /// flag is this CPU's own, so that its NMI handler comes before or after, not in between.
    pub(crate) fn take_kick(&self) {
        self.kicked.store(false, Ordering::Relaxed);
    }

    /// What INIT does to registers outside of the VMCS: SDM volume 3, section "Processor State
    /// After Reset". Extended state and most MSRs stay.
    pub(crate) fn reset_switched(&mut self) {
        let fresh = Switched::reset();
        // SAFETY: the vCPU is loaded: these registers are the guest's, and inert in the host.
        unsafe {
            asm!("mov cr2, {}", in(reg) fresh.cr2, options(nostack));
            asm!("mov dr0, {0}", "mov dr1, {0}", "mov dr2, {0}", "mov dr3, {0}",
                 in(reg) fresh.dr[0], options(nostack));
        }
        self.set_dr6(fresh.dr6);
    }

    pub(crate) fn caps(&self) -> &Capabilities {
        &self.vcpu.caps
    }

    /// The guest's XCR0.
    pub(crate) fn xcr0(&self) -> u64 {
        self.vcpu.switched.xcr0
    }

    /// Sets XCR0, for the guest and, since the vCPU is loaded, in the CPU.
    pub(crate) fn set_xcr0(&mut self, value: u64) {
        assert!(self.vcpu.cpuid.xstate().allows(value), "the caller has checked");
        self.vcpu.switched.xcr0 = value;
        // SAFETY: a mask other than 0, which `allows` demands, means that the host has set
        // CR4.OSXSAVE; the value is one that the CPU takes.
        unsafe { xstate::xsetbv(value) };
    }

    /// DR6 as the guest sees it; it is in the CPU while the vCPU is loaded.
    pub(crate) fn dr6(&self) -> u64 {
        let value;
        // SAFETY: reading DR6 at CPL 0; DR7.GD is 0 in the host.
        unsafe { asm!("mov {}, dr6", out(reg) value, options(nomem, nostack)) };
        value
    }

    /// DR0 to DR3, which are in the CPU as well.
    pub(crate) fn debug_addresses(&self) -> [u64; 4] {
        let (zero, one, two, three);
        // SAFETY: as for `dr6`.
        unsafe {
            asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3", out(reg) zero,
                 out(reg) one, out(reg) two, out(reg) three, options(nomem, nostack));
        }
        [zero, one, two, three]
    }

    /// As [`Self::dr6`].
    pub(crate) fn set_dr6(&mut self, value: u64) {
        // SAFETY: DR6 only reports; the upper half is kept 0.
        unsafe { asm!("mov dr6, {}", in(reg) value & 0xffff_ffff, options(nomem, nostack)) };
    }
}

impl Vcpu {
    /// Writes the VMCS back to memory, so that another CPU may load the vCPU, or its region be
    /// used for something else.
    ///
    /// # Errors
    ///
    /// VMfail of VMCLEAR.
    ///
    /// # Safety
    ///
    /// In VMX root operation on the CPU that loaded the vCPU last.
    pub unsafe fn clear(&mut self) -> Result<(), VmFail> {
        // SAFETY: the region is this vCPU's own and active on this CPU at most.
        unsafe { vmclear(self.region) }
    }
}
