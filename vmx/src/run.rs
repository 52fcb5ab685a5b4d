//! The guest loop: enter, look at the exit, answer it, enter again.

use core::convert::Infallible;
use core::fmt;

use raw_cpuid::CpuIdReaderNative;
use raw_cpuid::CpuIdResult;
use sld::{
    AcContext, MsrFault, MsrWrite, PerSecond, PreemptionDisabled, RealBit, Task, Verdict, Written,
};

use crate::addr::GuestPhysAddr;
use crate::apic::{Command, Delivery, Ipi};
use crate::bus_lock;
use crate::checks::{self, Finding, Processor};
use crate::controls::{Entry, Primary};
use crate::cpuid::OSXSAVE;
use crate::emulate::operand::CodeSize;
use crate::exit::{
    BasicReason, CrAccess, CrQualification, EptQualification, EventKind, ExitReason,
    InterruptionInfo, IoQualification, vector,
};
use crate::fields::*;
use crate::instruction::{VmFail, invvpid_single_context, last_error, now};
use crate::mailbox::{Mail, Mailbox, Signals};
use crate::msr_policy::{self, Policy};
use crate::paravirtual::{self, Source};
use crate::setup::*;
use crate::split_lock::AcReport;
use crate::vcpu::{Activity, Counters, Loaded, Step};
use crate::walk::{GuestRead, GuestWrite, Paging, translate};
use crate::world::register::{RAX, RBX, RCX, RDX, RSP};

/// The machine around a vCPU: what the hypervisor kernel provides while the vCPU runs.
pub trait Host {
    /// Access to this CPU's split-lock detection; see [`sld::PreemptionDisabled`].
    type Pinned: PreemptionDisabled;
    /// The guest's memory.
    type Memory: GuestWrite;

    /// What the vCPU's split locks are detected by, and the task that it runs on there: this CPU's
    /// detection, or where the VM is traced, the software that stands for it.
    fn sld(&mut self) -> (&mut Self::Pinned, &mut Task);
    /// Whether each instruction is to be looked at before it is executed: the VM is traced, and the
    /// software's bit is on.
    fn traces(&self) -> bool;
    /// Whether the VM's split locks are not what the CPU's own detection is for.
    fn is_aside(&self) -> bool;
    /// The CPU has raised #AC in a VM for which [`Self::is_aside`] holds: the verdict of its own
    /// detection.
    ///
    /// # Errors
    ///
    /// MSR 0x33 faulted.
    fn real_ac(&mut self, context: AcContext) -> Result<Verdict, MsrFault>;
    /// The guest's memory.
    fn memory(&self) -> &Self::Memory;

    /// IN of `size` (1, 2, 4) bytes.
    fn port_read(&mut self, port: u16, size: u8) -> u32;
    /// OUT of `size` (1, 2, 4) bytes.
    fn port_write(&mut self, port: u16, size: u8, value: u32) -> PortWrite;

    /// What other vCPUs have posted to this one.
    fn mailbox(&self) -> &Mailbox;
    /// The vCPU with the APIC ID `sender`, which is this one, sends an interprocessor interrupt to
    /// all others that it reaches.
    fn send(&mut self, ipi: Ipi, sender: u32);
    /// This CPU was kicked, or time has passed: whether the vCPU may go on.
    fn poll(&mut self) -> Poll;

    /// The guest touched `gpa`, where it has no memory. The host may let something stand there
    /// for the duration of one instruction, with the VM's other vCPUs out of the guest.
    fn map_hole(&mut self, gpa: GuestPhysAddr) -> Alone;
    /// That instruction is over.
    fn unmap_holes(&mut self);

    /// Switches split-lock detection off for one instruction of this vCPU, with the core's other
    /// threads out of their guests: [`Verdict::Step`].
    ///
    /// # Errors
    ///
    /// MSR 0x33 faulted.
    fn begin_step(&mut self) -> Result<Alone, MsrFault>;
    /// That instruction is over.
    ///
    /// # Errors
    ///
    /// MSR 0x33 faulted.
    fn end_step(&mut self) -> Result<(), MsrFault>;

    /// Keeps the VM's other vCPUs out of the guest until [`Self::release_vm`].
    fn stop_vm(&mut self) -> Alone;
    /// They may go on.
    fn release_vm(&mut self);
    /// Whether the guest, which may do that so many times a second, may lock the bus now. If not, the
    /// host has noted how long the vCPU waits.
    fn may_split(&mut self, limit: PerSecond) -> bool;

    /// The policy that the VM has now: it may have changed since the vCPU was made.
    fn policy(&self) -> sld::Policy;
    /// It is in force for this vCPU.
    fn on_policy(&mut self, policy: sld::Policy);
    /// The host has asked for it: how often the vCPU's guest has exited so far.
    fn on_inspect(&mut self, exits: &Counters);

    /// The guest raised #AC, and this was done about it.
    fn on_ac(&mut self, report: &AcReport);
    /// The guest wrote 0x33.
    fn on_test_ctrl_write(&mut self, value: u64, result: MsrWrite);
    /// The real bit was written.
    fn on_real_bit(&mut self, written: RealBit);
    /// Whether there is hardly any room left for what [`Self::on_ac`], [`Self::on_test_ctrl_write`]
    /// and [`Self::on_real_bit`] record: the turn is to end.
    fn is_full(&self) -> bool;
    /// An exit was taken: for the host's own trail.
    fn on_exit(&mut self, reason: BasicReason, rip: u64);

    /// VM entry refused the guest's state: what is wrong with it. Called at least once.
    fn on_invalid_state(&mut self, finding: &Finding<'_>);

    /// A non-maskable interrupt came while the guest ran.
    fn nmi(&mut self);
    /// An external interrupt came while the guest ran; it is acknowledged.
    fn interrupt(&mut self, vector: u8);
    /// A machine check came while the guest ran. Whether the guest can go on.
    fn machine_check(&mut self) -> bool;
}

/// What comes of an OUT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortWrite {
    /// It is done.
    Done,
    /// The device takes nothing now: the instruction is tried again in the vCPU's next turn.
    Full,
    /// The guest ends its VM with this status.
    End(u32),
}

/// What [`Host::poll`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Poll {
    /// Nothing that concerns this vCPU.
    GoOn,
    /// Another one is to have the CPU.
    Yield,
    /// The same, but not before so many ticks of the TSC.
    YieldIn(u64),
    /// Another vCPU of the VM holds this one out of the guest.
    Held,
}

/// Whether something that others must not see may happen now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alone {
    /// It may: they are held out of their guests.
    Yes,
    /// This vCPU is held out of the guest itself.
    Held,
    /// Another thread of the core came first, and is done: the guest executes its instruction again.
    Again,
    /// The VM cannot have it.
    Refused,
}

/// The bytes of an instruction, as far as they can be read: an instruction has 15 at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstructionBytes {
    bytes: [u8; 15],
    len: u8,
}

impl InstructionBytes {
    /// `len` of the bytes are valid, 15 if it is more.
    pub const fn new(bytes: [u8; 15], len: u8) -> Self {
        Self { bytes, len }
    }

    /// The valid ones.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len).min(15)]
    }
}

/// Where an #AC came from last: a guest that splits locks does it in few places, and walking its
/// page tables each time would cost as much as everything else.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AcPlace {
    rip: u64,
    cs_base: u64,
    cr3: u64,
    code: CodeSize,
    instruction: InstructionBytes,
}

/// Why [`Loaded::run`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The time slice is over.
    Slice,
    /// HLT with nothing pending, or INIT. The vCPU's timer will wake it at this time, in the host's
    /// TSC; `None` if only another vCPU can.
    Halt(Option<u64>),
    /// Another vCPU of the VM holds this one out of the guest.
    Held,
    /// The VM has ended elsewhere.
    Over,
    /// The VM is at its end.
    End(End),
}

/// How a VM ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The guest ended itself with this status.
    Exit(u32),
    /// A split lock where the policy is fatal.
    SplitLock,
    /// #AC although detection is off.
    BogusAc,
    /// The guest triple-faulted.
    TripleFault,
    /// VM entry refused the guest's state.
    InvalidState,
    /// An exit that this hypervisor has no answer to.
    Unhandled(BasicReason),
    /// VMLAUNCH or VMRESUME failed: ours to answer for.
    EntryFailed(VmFail),
    /// MSR 0x33, which worked at boot, faulted.
    PlatformFault,
    /// The hardware failed in a way that this guest cannot go on from.
    MachineCheck,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(_) => f.write_str("exit"),
            Self::SplitLock => f.write_str("split lock"),
            Self::BogusAc => f.write_str("bogus #AC"),
            Self::TripleFault => f.write_str("triple fault"),
            Self::InvalidState => f.write_str("invalid state"),
            Self::Unhandled(reason) => write!(f, "unhandled exit: {reason}"),
            Self::EntryFailed(fail) => write!(f, "entry failure: {fail}"),
            Self::PlatformFault => f.write_str("MSR 0x33 faulted"),
            Self::MachineCheck => f.write_str("machine check"),
        }
    }
}

impl From<MsrFault> for End {
    fn from(_: MsrFault) -> Self {
        Self::PlatformFault
    }
}

/// Blocking by STI and by MOV SS: bits 1:0 of the interruptibility state.
const BLOCKING_STI_MOV_SS: u32 = 3;
/// Blocking by MOV SS alone.
pub(crate) const BLOCKING_MOV_SS: u32 = 2;
/// Blocking by NMI: bit 3.
pub(crate) const BLOCKING_NMI: u32 = 1 << 3;
/// Pending debug exceptions: single step.
pub(crate) const PENDING_DEBUG_BS: u64 = 1 << 14;
/// Pending debug exceptions: an enabled breakpoint was met.
pub(crate) const PENDING_DEBUG_ENABLED: u64 = 1 << 12;
/// IA32_DEBUGCTL.LBR, which a #DB clears.
const DEBUGCTL_LBR: u64 = 1 << 0;
/// DR7.GD, which a #DB clears.
const DR7_GD: u64 = 1 << 13;
/// DR6: B0 to B3.
const DR6_B: u64 = 0xf;
/// DR6: B0 to B3, BD, BS.
const DR6_CAUSES: u64 = DR6_B | 1 << 13 | 1 << 14;

/// Whether the guest executes, after an exit for this reason, the same instruction again, or
/// takes an event instead.
const fn comes_back(reason: BasicReason) -> bool {
    matches!(
        reason,
        BasicReason::EPT_VIOLATION
            | BasicReason::EXCEPTION_OR_NMI
            | BasicReason::EXTERNAL_INTERRUPT
            | BasicReason::PREEMPTION_TIMER
    )
}

/// What an exit handler decides.
pub(crate) type Handled = Result<(), Stop>;

impl From<End> for Stop {
    fn from(end: End) -> Self {
        Self::End(end)
    }
}

impl Loaded<'_> {
    /// Runs the guest for at most `ticks` of the TSC, time in the hypervisor included.
    pub fn run(&mut self, host: &mut impl Host, ticks: u64) -> Stop {
        let now = now();
        self.vcpu.stop_at = now.saturating_add(ticks);
        let stop = match self.run_until_stop(host, now) {
            Ok(never) => match never {},
            Err(stop) => stop,
        };
        match self.abandon_steps(host) {
            Ok(()) => stop,
            Err(end) => end,
        }
    }

    fn run_until_stop(&mut self, host: &mut impl Host, start: u64) -> Result<Infallible, Stop> {
        self.attend(host, start, None)?;
        loop {
            // SAFETY: `self` proves that this vCPU's VMCS is current here and that the host state
            // is this CPU's; interrupts are off (contract of `load`).
            let failed = unsafe { crate::world::enter(&raw mut self.vcpu.state) };
            if failed != 0 {
                let fail = if failed == 1 { VmFail::Invalid } else { last_error() };
                return Err(End::EntryFailed(fail).into());
            }
            let reason = ExitReason(self.vmcs.read(EXIT_REASON));
            if reason.is_unusual() {
                if reason.is_entry_failure() {
                    return Err(self.entry_failure(host, reason.basic()).into());
                }
                // An exit of that reason may say so twice.
                if reason.has_bus_lock() && reason.basic() != BasicReason::BUS_LOCK {
                    self.note_bus_lock();
                }
            }
            self.handle(host, reason.basic())?;
            // A guest that exits all the time must neither live on time in which the preemption
            // timer stands still, nor have its own timer late for it.
            let now = now();
            if now >= self.vcpu.attention_at {
                self.attend(host, now, Some(reason.basic()))?;
            }
        }
    }

    /// It is `now`, and something besides the guest's instructions may be due: the end of the
    /// turn, an order of the host, what other vCPUs have posted, the guest's timer, the end of a
    /// step or its beginning. `after`: the exit before, if there was one.
    #[inline(never)]
    fn attend(
        &mut self,
        host: &mut impl Host,
        mut time: u64,
        mut after: Option<BasicReason>,
    ) -> Handled {
        while !self.prepare(host, time, after)? {
            (time, after) = (now(), None);
        }
        Ok(())
    }

    /// What [`Self::attend`] does before a VM entry; false if an instruction was carried out in place of
    /// one.
    #[inline(always)]
    fn prepare(
        &mut self,
        host: &mut impl Host,
        now: u64,
        after: Option<BasicReason>,
    ) -> Result<bool, Stop> {
        // Most exits of a guest that is traced: nothing is due. What others have posted they have
        // kicked for.
        if self.vcpu.step == Step::TRACE
            && after == Some(BasicReason::MONITOR_TRAP_FLAG)
            && now < self.vcpu.stop_at.min(self.vcpu.due_at)
            && !self.is_kicked()
        {
            return self.trace(host);
        }
        if self.vcpu.step.contains(Step::BEGUN) {
            self.vcpu.step.remove(Step::BEGUN);
            return Ok(true);
        }
        let only_stepped =
            self.vcpu.step == Step::SPLIT_LOCK && after == Some(BasicReason::MONITOR_TRAP_FLAG);
        self.end_split_lock_step(host)?;
        if only_stepped && now < self.vcpu.stop_at {
            // What else has come since it was attended to last kicks.
            self.tick(now);
            return Ok(true);
        }
        // An instruction that exits is carried out by the hypervisor, and no trap comes after it.
        if self.vcpu.step.contains(Step::HOLE) && !after.is_some_and(comes_back) {
            self.step_done(host);
        }
        if self.vcpu.step.contains(Step::HOLE) {
            // Others wait for this one instruction: everything else has to. A kick that comes now
            // costs one more exit.
            self.vmcs.write(PREEMPTION_TIMER_VALUE, u32::MAX);
            self.begin_wanted_step(host)?;
            return self.trace(host);
        }
        if now >= self.vcpu.stop_at {
            return Err(Stop::Slice);
        }
        // From here on a kick is about something that was not there yet.
        self.take_kick();
        if let Some(mail) = host.mailbox().take() {
            self.open_mail(host, mail)?;
        }
        // Not before the mail, for which a vCPU that waits would be woken again and again.
        self.limit_bus_locks(host)?;
        match host.poll() {
            Poll::GoOn => {}
            Poll::Yield => return Err(Stop::Slice),
            Poll::YieldIn(ticks) => {
                self.vcpu.stop_at = self.vcpu.stop_at.min(now.saturating_add(ticks));
            }
            Poll::Held => return Err(Stop::Held),
        }
        self.tick(now);
        self.stay_halted()?;
        self.begin_wanted_step(host)?;
        self.trace(host)
    }

    /// The guest took the bus.
    #[cold]
    fn note_bus_lock(&mut self) {
        self.vcpu.counters.bus_locks += 1;
        self.vcpu.bus_locked = true;
        self.want_attention();
    }

    /// Who took the bus waits now, if its VM has had as many as it may have: until this time is one of
    /// those. If it were not, each vCPU would have one more each time that one of them has waited.
    fn limit_bus_locks(&mut self, host: &mut impl Host) -> Handled {
        if self.vcpu.bus_locked {
            if let Some(limit) = bus_lock::limit(self.vcpu.sld.vm())
                && !host.may_split(limit)
            {
                return Err(Stop::Held);
            }
            self.vcpu.bus_locked = false;
        }
        Ok(())
    }

    /// Has [`Self::attend`] called after the exit that is being handled.
    pub(crate) fn want_attention(&mut self) {
        self.vcpu.attention_at = 0;
    }

    /// The turn is over: nothing that was to last for one instruction stays.
    fn abandon_steps(&mut self, host: &mut impl Host) -> Handled {
        if !self.vcpu.step.intersects(Step::ONE) {
            return Ok(());
        }
        self.give_up_step(host);
        let ended = self.end_split_lock_step(host);
        if self.vcpu.step.contains(Step::HOLE) {
            self.step_done(host);
        }
        ended
    }

    /// What other vCPUs have posted takes effect.
    fn open_mail(&mut self, host: &mut impl Host, mail: Mail) -> Handled {
        if mail.signals.contains(Signals::END) {
            return Err(Stop::Over);
        }
        if mail.signals.contains(Signals::INIT) {
            self.init(host)?;
        }
        if mail.signals.contains(Signals::SIPI) && self.vcpu.activity == Activity::WaitForSipi {
            startup(&mut self.vmcs, mail.sipi_vector);
            self.vcpu.activity = Activity::Active;
        }
        if mail.signals.contains(Signals::NMI) {
            self.raise_nmi();
        }
        if mail.signals.contains(Signals::INTERRUPT) {
            self.vcpu.apic.raise_all(mail.vectors);
        }
        if mail.signals.contains(Signals::POLICY) {
            self.take_policy(host)?;
        }
        if mail.signals.contains(Signals::INSPECT) {
            host.on_inspect(&self.vcpu.counters);
        }
        Ok(())
    }

    /// The VM's new policy comes into force for this vCPU: also for a split lock that waits for its
    /// step, which raises its #AC again.
    #[cold]
    #[inline(never)]
    fn take_policy(&mut self, host: &mut impl Host) -> Handled {
        self.give_up_step(host);
        let policy = host.policy();
        let (pinned, task) = host.sld();
        // The host has asked `VmPolicy::with` before; a policy that cannot be kept changes nothing.
        if let Ok(written) = self.vcpu.sld.set_policy(pinned, task, policy) {
            let written = written.map_err(End::from)?;
            host.on_policy(policy);
            written.into_iter().for_each(|written| host.on_real_bit(written));
        }
        self.make_room(host);
        Ok(())
    }

    /// INIT: SDM volume 3, section "Processor State After Reset". Every vCPU waits for SIPI after
    /// it, the first one too: there is no firmware that it could start.
    fn init(&mut self, host: &mut impl Host) -> Handled {
        self.give_up_step(host);
        init(&mut self.vmcs, &self.vcpu.cr4);
        for control in [Primary::INTERRUPT_WINDOW_EXITING, Primary::NMI_WINDOW_EXITING] {
            self.set_primary(control, false);
        }
        self.vcpu.state.registers = [0; 16];
        self.vcpu.state.registers[RDX] = self.vcpu.cpuid.answer(1, 0).eax.into();
        self.reset_switched();
        self.flush_tlb();
        self.vcpu.apic.reset();
        self.vcpu.pending_nmi = false;
        self.vcpu.ac_place = None;
        self.vcpu.activity = Activity::WaitForSipi;
        let (pinned, task) = host.sld();
        let written = self.vcpu.sld.reset(pinned, task).map_err(End::from)?;
        written.into_iter().for_each(|written| host.on_real_bit(written));
        Ok(())
    }

    #[inline(always)]
    fn handle(&mut self, host: &mut impl Host, reason: BasicReason) -> Handled {
        self.vcpu.counters.count(reason);
        let rip = self.vmcs.read(GUEST_RIP);
        host.on_exit(reason, rip);
        match reason {
            BasicReason::CPUID => self.cpuid(rip),
            BasicReason::RDMSR => self.rdmsr(),
            BasicReason::WRMSR => self.wrmsr(host)?,
            BasicReason::IO => self.io(host)?,
            BasicReason::EXCEPTION_OR_NMI => self.exception(host)?,
            BasicReason::EXTERNAL_INTERRUPT => {
                host.interrupt(InterruptionInfo(self.vmcs.read(EXIT_INTERRUPTION_INFO)).vector());
            }
            // The guest's own timer, the end of its turn, or a kick that came too late to exit.
            BasicReason::PREEMPTION_TIMER => self.want_attention(),
            BasicReason::HLT => self.hlt(),
            BasicReason::EPT_VIOLATION => self.ept_violation(host)?,
            BasicReason::MONITOR_TRAP_FLAG => self.step_done(host),
            // The instruction is done, or an event's delivery is to go on.
            BasicReason::BUS_LOCK => {
                self.note_bus_lock();
                self.requeue();
            }
            BasicReason::CR_ACCESS => self.cr_access(host),
            BasicReason::INTERRUPT_WINDOW => self.deliver_interrupt(true),
            BasicReason::NMI_WINDOW => self.deliver_nmi(),
            BasicReason::TRIPLE_FAULT => return Err(End::TripleFault.into()),
            // Guest memory is write-back and private: there is nothing to lose or to write back.
            BasicReason::INVD | BasicReason::WBINVD => self.skip_instruction(),
            BasicReason::RDPMC => self.inject_gp(),
            BasicReason::XSETBV => self.xsetbv(),
            // The guest spins: somebody else had better run.
            BasicReason::PAUSE => {
                self.skip_instruction();
                return Err(Stop::Slice);
            }
            // Not offered by CPUID, so they do not exist.
            BasicReason::MWAIT
            | BasicReason::MONITOR
            | BasicReason::GETSEC
            | BasicReason::VMCALL
            | BasicReason::VMCLEAR
            | BasicReason::VMLAUNCH
            | BasicReason::VMPTRLD
            | BasicReason::VMPTRST
            | BasicReason::VMREAD
            | BasicReason::VMRESUME
            | BasicReason::VMWRITE
            | BasicReason::VMXOFF
            | BasicReason::VMXON
            | BasicReason::INVEPT
            | BasicReason::INVVPID => self.inject_fault(vector::UD, None),
            other => return Err(End::Unhandled(other).into()),
        }
        Ok(())
    }

    #[cold]
    fn entry_failure(&self, host: &mut impl Host, reason: BasicReason) -> End {
        if reason == BasicReason::INVALID_GUEST_STATE {
            let cpu = Processor::read(&CpuIdReaderNative);
            checks::diagnose(&self.vmcs, self.caps(), &cpu, |finding| {
                host.on_invalid_state(finding);
            });
            return End::InvalidState;
        }
        if reason == BasicReason::MACHINE_CHECK_DURING_ENTRY {
            // Whatever the banks say: it cannot be told how much of the guest's state was loaded.
            host.machine_check();
            return End::MachineCheck;
        }
        End::Unhandled(reason)
    }

    /// Moves RIP behind the instruction that exited, ends the shadow of STI and MOV SS, and lets
    /// a single step trap afterwards, as if the CPU had executed it.
    #[inline(always)]
    fn skip_instruction(&mut self) {
        let rip = self.vmcs.read(GUEST_RIP);
        self.skip_instruction_at(rip);
    }

    /// The same where RIP is known already.
    #[inline(always)]
    fn skip_instruction_at(&mut self, rip: u64) {
        self.skip_bytes(rip, self.vmcs.read(EXIT_INSTRUCTION_LENGTH).into());
    }

    /// The same for an instruction whose length no exit tells.
    #[inline(always)]
    pub(crate) fn skip_bytes(&mut self, rip: u64, length: u64) {
        let mut next = rip.wrapping_add(length);
        if (rip ^ next) >> 32 != 0 && !self.in_64_bit_mode() {
            next &= 0xffff_ffff;
        }
        self.vmcs.write(GUEST_RIP, next);
        let blocking = self.vmcs.read(GUEST_INTERRUPTIBILITY);
        if blocking & BLOCKING_STI_MOV_SS != 0 {
            self.vmcs.write(GUEST_INTERRUPTIBILITY, blocking & !BLOCKING_STI_MOV_SS);
        }
        if self.vmcs.read(GUEST_RFLAGS) & RFLAGS_TF != 0 {
            let pending = self.vmcs.read(GUEST_PENDING_DEBUG);
            self.vmcs.write(GUEST_PENDING_DEBUG, pending | PENDING_DEBUG_BS);
        }
    }

    #[inline(always)]
    fn cpuid(&mut self, rip: u64) {
        let leaf = self.vcpu.state.registers[RAX] as u32;
        let CpuIdResult { eax, ebx, ecx, edx } = match self.vcpu.cpuid.plain(leaf) {
            Some(answer) => *answer,
            None => self.other_cpuid(leaf, self.vcpu.state.registers[RCX] as u32),
        };
        let registers = &mut self.vcpu.state.registers;
        registers[RAX] = eax.into();
        registers[RBX] = ebx.into();
        registers[RCX] = ecx.into();
        registers[RDX] = edx.into();
        self.skip_instruction_at(rip);
    }

    #[inline(never)]
    fn other_cpuid(&self, leaf: u32, subleaf: u32) -> CpuIdResult {
        if leaf == 0xd {
            return self.vcpu.cpuid.extended_state(subleaf, self.xcr0());
        }
        if leaf == paravirtual::LEAF {
            let vm = self.vcpu.sld.vm();
            return paravirtual::answer(vm, Source::of(self.vcpu.source, vm, self.caps()));
        }
        let mut answer = *self.vcpu.cpuid.answer(leaf, subleaf);
        if leaf == 1 && self.vmcs.read(GUEST_CR4) & CR4_OSXSAVE != 0 {
            answer.ecx |= OSXSAVE;
        }
        answer
    }

    fn rdmsr(&mut self) {
        let number = self.vcpu.state.registers[RCX] as u32;
        let value = match msr_policy::policy(number) {
            Policy::Apic(register) => self.read_apic(register),
            Policy::TscDeadline => Some(self.read_tsc_deadline()),
            Policy::TestCtrl => self.vcpu.sld.guest_rdmsr(sld::Msr::TestCtrl),
            Policy::CoreCapabilities => self.vcpu.sld.guest_rdmsr(sld::Msr::CoreCapabilities),
            Policy::Constant(value) => Some(value),
            Policy::ApicBase => Some(self.vcpu.apic.base()),
            Policy::Pass | Policy::Tsc | Policy::Fault => None,
        };
        match value {
            Some(value) => {
                self.vcpu.state.registers[RAX] = value & 0xffff_ffff;
                self.vcpu.state.registers[RDX] = value >> 32;
                self.skip_instruction();
            }
            None => self.inject_gp(),
        }
    }

    fn wrmsr(&mut self, host: &mut impl Host) -> Handled {
        let registers = &self.vcpu.state.registers;
        let number = registers[RCX] as u32;
        let value = registers[RDX] << 32 | registers[RAX] & 0xffff_ffff;
        let accepted = match msr_policy::policy(number) {
            Policy::TestCtrl => self.write_test_ctrl(host, value)?,
            Policy::Constant(_) => true,
            Policy::ApicBase => value == self.vcpu.apic.base(),
            Policy::Tsc => self.write_tsc(value),
            Policy::Apic(register) => self.write_apic(host, register, value),
            Policy::TscDeadline => self.write_tsc_deadline(value),
            Policy::CoreCapabilities | Policy::Pass | Policy::Fault => false,
        };
        if accepted {
            self.skip_instruction()
        } else {
            self.inject_gp()
        }
        Ok(())
    }

    #[inline(always)]
    fn write_test_ctrl(&mut self, host: &mut impl Host, value: u64) -> Result<bool, Stop> {
        self.end_split_lock_step(host)?;
        let (pinned, task) = host.sld();
        let result = self
            .vcpu
            .sld
            .guest_wrmsr(pinned, task, sld::Msr::TestCtrl, value)
            .map_err(End::from)?;
        host.on_test_ctrl_write(value, result);
        if let MsrWrite::Propagated(written) = result {
            host.on_real_bit(written);
            // Tracing begins or ends.
            if host.traces() != self.vcpu.step.contains(Step::TRACE) {
                self.want_attention();
            }
        }
        self.make_room(host);
        Ok(!matches!(result, MsrWrite::Gp))
    }

    fn io(&mut self, host: &mut impl Host) -> Handled {
        let io = IoQualification(self.vmcs.read(EXIT_QUALIFICATION));
        if io.is_string() {
            return Err(End::Unhandled(BasicReason::IO).into());
        }
        let rax = &mut self.vcpu.state.registers[RAX];
        let mask = u64::MAX >> (64 - 8 * u32::from(io.size()));
        if io.is_in() {
            let value = u64::from(host.port_read(io.port(), io.size())) & mask;
            // IN EAX clears the upper half of RAX, the narrower forms keep the rest.
            *rax = if io.size() == 4 { value } else { *rax & !mask | value };
        } else {
            let value = (*rax & mask) as u32;
            match host.port_write(io.port(), io.size(), value) {
                PortWrite::Done => {}
                PortWrite::Full => return Err(Stop::Slice),
                PortWrite::End(status) => return Err(End::Exit(status).into()),
            }
        }
        self.skip_instruction();
        Ok(())
    }

    fn xsetbv(&mut self) {
        let registers = &self.vcpu.state.registers;
        let value = registers[RDX] << 32 | registers[RAX] & 0xffff_ffff;
        if registers[RCX] as u32 == 0 && self.vcpu.cpuid.xstate().allows(value) {
            self.set_xcr0(value);
            self.skip_instruction();
        } else {
            self.inject_gp();
        }
    }

    /// Ends the turn if the records of what happened need to be written out.
    pub(crate) fn make_room(&mut self, host: &impl Host) {
        if host.is_full() {
            self.vcpu.stop_at = 0;
            self.want_attention();
        }
    }

    fn hlt(&mut self) {
        self.skip_instruction();
        self.vcpu.activity = Activity::Halted;
        self.want_attention();
    }

    /// Whether a vCPU that has executed HLT, or was reset, may go on: only an event ends that.
    fn stay_halted(&mut self) -> Handled {
        match self.vcpu.activity {
            Activity::Active => return Ok(()),
            Activity::Halted => {}
            Activity::WaitForSipi => return Err(Stop::Halt(None)),
        }
        let nmi =
            self.vcpu.pending_nmi && self.vmcs.read(GUEST_INTERRUPTIBILITY) & BLOCKING_NMI == 0;
        if nmi || self.entry_event().is_valid() {
            self.vcpu.activity = Activity::Active;
            return Ok(());
        }
        let interruptible = self.vmcs.read(GUEST_RFLAGS) & RFLAGS_IF != 0;
        let deadline = self.vcpu.apic.wakes_at().filter(|_| interruptible);
        Err(Stop::Halt(deadline.map(|at| at.wrapping_sub(self.vcpu.tsc_offset))))
    }

    // ---- Local APIC ----------------------------------------------------------------------------

    fn guest_tsc(&self, now: u64) -> u64 {
        now.wrapping_add(self.vcpu.tsc_offset)
    }

    /// It is `now` (host's TSC): the guest's timer fires if it is due, and the preemption timer is
    /// set for it or for the end of the turn, whichever comes first.
    #[inline(never)]
    pub(crate) fn tick(&mut self, now: u64) {
        let mut ticks = self.vcpu.stop_at.saturating_sub(now);
        let guest_now = self.guest_tsc(now);
        self.vcpu.apic.tick(guest_now);
        if let Some(deadline) = self.vcpu.apic.wakes_at() {
            ticks = ticks.min(deadline.saturating_sub(guest_now));
        }
        self.vcpu.due_at = now.saturating_add(ticks);
        self.vcpu.attention_at = self.vcpu.due_at;
        // After the one instruction of a step there is always something to do, and after each one of
        // a guest that is traced.
        if !self.vcpu.step.is_empty() {
            self.want_attention();
        }
        let count = (ticks >> self.caps().preemption_timer_shift()).min(u64::from(u32::MAX));
        self.vmcs.write(PREEMPTION_TIMER_VALUE, count as u32);
        // The NMI handler has written 0 there, perhaps just before.
        if self.is_kicked() {
            self.vmcs.write(PREEMPTION_TIMER_VALUE, 0);
        }
        // A step is for the instruction that it was begun for.
        if !self.vcpu.step.intersects(Step::ONE) && self.vcpu.apic.deliverable().is_some() {
            self.deliver_interrupt(false);
        }
    }

    // The time-stamp counter and the local APIC stand apart from `rdmsr` and `wrmsr`, so that
    // those save no registers for them.

    #[inline(never)]
    fn write_tsc(&mut self, value: u64) -> bool {
        let now = now();
        let before = core::mem::replace(&mut self.vcpu.tsc_offset, value.wrapping_sub(now));
        self.vmcs.write(TSC_OFFSET, self.vcpu.tsc_offset);
        self.vcpu.apic.clock_moved(self.vcpu.tsc_offset.wrapping_sub(before));
        self.tick(now);
        true
    }

    #[inline(never)]
    fn write_tsc_deadline(&mut self, value: u64) -> bool {
        self.vcpu.apic.set_tsc_deadline(value);
        self.tick(now());
        true
    }

    #[inline(never)]
    fn read_tsc_deadline(&mut self) -> u64 {
        let guest_now = self.guest_tsc(now());
        self.vcpu.apic.tick(guest_now);
        self.vcpu.apic.tsc_deadline()
    }

    #[inline(never)]
    fn read_apic(&mut self, register: u32) -> Option<u64> {
        let guest_now = self.guest_tsc(now());
        self.vcpu.apic.tick(guest_now);
        self.vcpu.apic.read(register, guest_now)
    }

    /// WRMSR of an x2APIC register; false for #GP(0).
    #[inline(never)]
    fn write_apic(&mut self, host: &mut impl Host, register: u32, value: u64) -> bool {
        let now = now();
        let guest_now = self.guest_tsc(now);
        let Ok(command) = self.vcpu.apic.write(register, value, guest_now) else { return false };
        if let Command::Ipi(ipi) = command {
            let id = self.vcpu.apic.id();
            host.send(ipi, id);
            if ipi.reaches(id, id) {
                match ipi.delivery() {
                    Delivery::Fixed(vector) => self.vcpu.apic.raise(vector),
                    Delivery::Nmi => self.raise_nmi(),
                    other => host.mailbox().post(other),
                }
            }
        }
        self.tick(now);
        if !host.mailbox().is_empty() {
            self.want_attention();
        }
        true
    }

    /// An NMI waits for the guest to be able to take it.
    fn raise_nmi(&mut self) {
        self.vcpu.pending_nmi = true;
        self.set_primary(Primary::NMI_WINDOW_EXITING, true);
    }

    fn exception(&mut self, host: &mut impl Host) -> Handled {
        let info = InterruptionInfo(self.vmcs.read(EXIT_INTERRUPTION_INFO));
        match (info.kind(), info.vector()) {
            (EventKind::Nmi, _) => {
                host.nmi();
                self.requeue();
                self.want_attention();
            }
            (_, vector::AC) => self.alignment_check(host, info)?,
            (_, vector::DB) => self.debug_exception(info),
            (_, vector::MC) => {
                if !host.machine_check() {
                    return Err(End::MachineCheck.into());
                }
                self.restore_nmi_blocking(info.nmi_unblocked_by_iret());
                self.requeue();
            }
            _ => return Err(End::Unhandled(BasicReason::EXCEPTION_OR_NMI).into()),
        }
        Ok(())
    }

    /// #DB is intercepted to break endless loops only: the guest gets it as it would have.
    fn debug_exception(&mut self, info: InterruptionInfo) {
        let causes = self.vmcs.read(EXIT_QUALIFICATION) & DR6_CAUSES;
        let dr6 = self.dr6() & !DR6_B | causes;
        self.set_dr6(dr6);
        let dr7 = self.vmcs.read(GUEST_DR7);
        self.vmcs.write(GUEST_DR7, dr7 & !DR7_GD);
        let debugctl = self.vmcs.read(GUEST_IA32_DEBUGCTL);
        self.vmcs.write(GUEST_IA32_DEBUGCTL, debugctl & !DEBUGCTL_LBR);
        self.keep_interrupted(false);
        // VM entry wants BS pending when it delivers with TF set in the shadow of STI or MOV SS:
        // SDM volume 3, section "Checks on Guest Non-Register State".
        let blocked = self.vmcs.read(GUEST_INTERRUPTIBILITY) & BLOCKING_STI_MOV_SS != 0;
        if blocked && self.vmcs.read(GUEST_RFLAGS) & RFLAGS_TF != 0 {
            self.vmcs.write(GUEST_PENDING_DEBUG, PENDING_DEBUG_BS);
        }
        let length = self.vmcs.read(EXIT_INSTRUCTION_LENGTH);
        self.inject(info.kind(), vector::DB, None, length);
    }

    fn ept_violation(&mut self, host: &mut impl Host) -> Handled {
        self.end_split_lock_step(host)?;
        let qualification = EptQualification(self.vmcs.read(EXIT_QUALIFICATION));
        let gpa = GuestPhysAddr::new_truncate(self.vmcs.read(GUEST_PHYSICAL_ADDRESS));
        self.restore_nmi_blocking(qualification.nmi_unblocked_by_iret());
        self.requeue();
        match host.map_hole(gpa) {
            Alone::Yes => {
                self.vcpu.step.insert(Step::HOLE);
                self.set_monitor_trap();
                self.want_attention();
                Ok(())
            }
            Alone::Held => Err(Stop::Held),
            Alone::Again => Ok(()),
            Alone::Refused => Err(End::Unhandled(BasicReason::EPT_VIOLATION).into()),
        }
    }

    /// The one instruction has been executed, or an event delivered in its place.
    pub(crate) fn step_done(&mut self, host: &mut impl Host) {
        if self.vcpu.step.contains(Step::HOLE) {
            self.vcpu.step.remove(Step::HOLE);
            host.unmap_holes();
            self.set_monitor_trap();
        }
        self.want_attention();
    }

    /// The monitor trap flag is on while anything is stepped.
    pub(crate) fn set_monitor_trap(&mut self) {
        let on = self.vcpu.step.intersects(Step::TRAP);
        self.set_primary(Primary::MONITOR_TRAP_FLAG, on);
    }

    pub(crate) fn set_primary(&mut self, control: Primary, on: bool) {
        let bits = self.vmcs.read(PRIMARY_CONTROLS);
        let bits = if on { bits | control.bits() } else { bits & !control.bits() };
        self.vmcs.write(PRIMARY_CONTROLS, bits);
    }

    // ---- Events ------------------------------------------------------------------------------

    /// What the next VM entry will deliver.
    pub(crate) fn entry_event(&self) -> InterruptionInfo {
        InterruptionInfo(self.vmcs.read(ENTRY_INTERRUPTION_INFO))
    }

    /// Injects a fault of the instruction that exited.
    fn inject_fault(&mut self, vector: u8, error: Option<u32>) {
        let protected = self.vmcs.read(GUEST_CR0) & CR0_PE != 0;
        self.inject(EventKind::HardwareException, vector, error.filter(|_| protected), 0);
    }

    fn inject_gp(&mut self) {
        self.inject_fault(vector::GP, Some(0));
    }

    /// Has the next VM entry deliver an event. The field is cleared by each exit, so that what
    /// stands there is always what the last exit's handler decided.
    pub(crate) fn inject(&mut self, kind: EventKind, vector: u8, error: Option<u32>, length: u32) {
        let info = InterruptionInfo::inject(kind, vector, error.is_some());
        self.vmcs.write(ENTRY_INTERRUPTION_INFO, info.0);
        if let Some(error) = error {
            self.vmcs.write(ENTRY_EXCEPTION_ERROR_CODE, error);
        }
        if kind.is_software() {
            self.vmcs.write(ENTRY_INSTRUCTION_LENGTH, length);
        }
    }

    /// Has the next VM entry deliver again what the exit interrupted: the guest's instruction, or
    /// the event's delivery, is resumed.
    pub(crate) fn requeue(&mut self) {
        let info = InterruptionInfo(self.vmcs.read(IDT_VECTORING_INFO));
        if !info.is_valid() {
            return;
        }
        self.vmcs.write(ENTRY_INTERRUPTION_INFO, info.for_entry());
        if info.has_error_code() {
            let error = self.vmcs.read(IDT_VECTORING_ERROR_CODE);
            self.vmcs.write(ENTRY_EXCEPTION_ERROR_CODE, error);
        }
        if info.kind().is_software() {
            let length = self.vmcs.read(EXIT_INSTRUCTION_LENGTH);
            self.vmcs.write(ENTRY_INSTRUCTION_LENGTH, length);
        }
        if info.kind() == EventKind::Nmi {
            self.unblock_nmi();
        }
    }

    /// An exception is about to be injected in place of the event whose delivery the exit
    /// interrupted. A fault or a software interrupt will recur by itself; an external interrupt or
    /// an NMI would be lost, so it waits for the guest to be able to take it.
    pub(crate) fn keep_interrupted(&mut self, nmi_unblocked_by_iret: bool) {
        let info = InterruptionInfo(self.vmcs.read(IDT_VECTORING_INFO));
        match info.kind() {
            EventKind::External if info.is_valid() => {
                self.vcpu.apic.unacknowledge(info.vector());
                self.set_primary(Primary::INTERRUPT_WINDOW_EXITING, true);
            }
            EventKind::Nmi if info.is_valid() => {
                self.vcpu.pending_nmi = true;
                let blocking = self.vmcs.read(GUEST_INTERRUPTIBILITY);
                self.vmcs.write(GUEST_INTERRUPTIBILITY, blocking & !BLOCKING_NMI);
                self.set_primary(Primary::NMI_WINDOW_EXITING, true);
            }
            _ => self.restore_nmi_blocking(nmi_unblocked_by_iret),
        }
    }

    /// IRET had ended NMI blocking before it faulted; it will be executed again, so the blocking
    /// must stand again: SDM volume 3, section "Resuming Guest Software after Handling an
    /// Exception".
    pub(crate) fn restore_nmi_blocking(&mut self, unblocked_by_iret: bool) {
        let interrupted = InterruptionInfo(self.vmcs.read(IDT_VECTORING_INFO)).is_valid();
        if unblocked_by_iret && !interrupted {
            let blocking = self.vmcs.read(GUEST_INTERRUPTIBILITY);
            self.vmcs.write(GUEST_INTERRUPTIBILITY, blocking | BLOCKING_NMI);
        }
    }

    /// Delivers the interrupt that the local APIC would deliver, or waits until the guest can take
    /// it. `window`: it can, says the CPU. Otherwise a single step may be about to trap, which comes
    /// first and would be lost.
    fn deliver_interrupt(&mut self, window: bool) {
        let Some(vector) = self.vcpu.apic.deliverable() else {
            self.set_primary(Primary::INTERRUPT_WINDOW_EXITING, false);
            return;
        };
        let flags = self.vmcs.read(GUEST_RFLAGS);
        let open = flags & RFLAGS_IF != 0
            && (window || flags & RFLAGS_TF == 0)
            && self.vmcs.read(GUEST_INTERRUPTIBILITY) & BLOCKING_STI_MOV_SS == 0
            && !self.entry_event().is_valid();
        if open {
            self.vcpu.apic.acknowledge(vector);
            self.inject(EventKind::External, vector, None, 0);
        }
        self.set_primary(Primary::INTERRUPT_WINDOW_EXITING, !open);
    }

    /// Nothing may block an NMI that VM entry is to inject. Delivery blocks further ones by itself.
    fn unblock_nmi(&mut self) {
        let blocking = self.vmcs.read(GUEST_INTERRUPTIBILITY);
        let open = blocking & !(BLOCKING_NMI | BLOCKING_STI_MOV_SS);
        self.vmcs.write(GUEST_INTERRUPTIBILITY, open);
    }

    /// The guest can take the NMI that waits for it.
    fn deliver_nmi(&mut self) {
        self.set_primary(Primary::NMI_WINDOW_EXITING, false);
        if core::mem::take(&mut self.vcpu.pending_nmi) {
            self.unblock_nmi();
            self.inject(EventKind::Nmi, vector::NMI, None, 0);
        }
    }

    // ---- Control registers ---------------------------------------------------------------------

    fn register_operand(&self, index: usize) -> u64 {
        if index == RSP { self.vmcs.read(GUEST_RSP) } else { self.vcpu.state.registers[index] }
    }

    fn cr_access(&mut self, host: &mut impl Host) {
        let qualification = CrQualification(self.vmcs.read(EXIT_QUALIFICATION));
        let operand = qualification.operand();
        let accepted = match (qualification.register(), qualification.access()) {
            (0, CrAccess::Write) => {
                let value = self.register_operand(operand);
                self.write_cr0(host, value)
            }
            (0, CrAccess::Lmsw(source)) => {
                // LMSW sets PE, MP, EM and TS, and cannot clear PE.
                let old = self.guest_cr0();
                let new = old & !0xe | u64::from(source) & 0xf;
                self.write_cr0(host, new)
            }
            (4, CrAccess::Write) => {
                let value = self.register_operand(operand);
                self.write_cr4(host, value)
            }
            (8, CrAccess::Read) => {
                let value = self.vcpu.apic.cr8();
                match operand {
                    RSP => self.vmcs.write(GUEST_RSP, value),
                    _ => self.vcpu.state.registers[operand] = value,
                }
                true
            }
            (8, CrAccess::Write) => {
                let value = self.register_operand(operand);
                let accepted = self.vcpu.apic.set_cr8(value).is_ok();
                if accepted && self.vcpu.apic.deliverable().is_some() {
                    self.deliver_interrupt(false);
                }
                accepted
            }
            // CR0.TS is the guest's own, and CR3 does not exit.
            _ => false,
        };
        if accepted { self.skip_instruction() } else { self.inject_gp() }
    }

    /// CR0 as the guest sees it.
    fn guest_cr0(&self) -> u64 {
        let shadow = self.vmcs.read(CR0_READ_SHADOW);
        self.vmcs.read(GUEST_CR0) & CR0_GUEST_OWNED | shadow & !CR0_GUEST_OWNED
    }

    /// CR4 as the guest sees it.
    fn guest_cr4(&self) -> u64 {
        let owned = self.vcpu.cr4.guest_owned();
        self.vmcs.read(GUEST_CR4) & owned | self.vmcs.read(CR4_READ_SHADOW) & !owned
    }

    #[inline(always)]
    pub(crate) fn in_64_bit_mode(&self) -> bool {
        self.vmcs.read(GUEST_CS_ACCESS_RIGHTS) & 1 << 13 != 0
            && self.vmcs.read(GUEST_IA32_EFER) & EFER_LMA != 0
    }

    /// Carries out MOV to CR0 where a host-owned bit changes; false for #GP(0). SDM volume 2,
    /// "MOV—Move to/from Control Registers".
    fn write_cr0(&mut self, host: &mut impl Host, value: u64) -> bool {
        let old = self.guest_cr0();
        let known = CR0_GUEST_OWNED | CR0_ET | CR0_NE | CR0_NW | CR0_CD;
        let paging = value & CR0_PG != 0;
        if value >> 32 != 0 || paging && value & CR0_PE == 0 || value & (CR0_NW | CR0_CD) == CR0_NW
        {
            return false;
        }
        let mut efer = self.vmcs.read(GUEST_IA32_EFER);
        let cr4 = self.guest_cr4();
        if paging && old & CR0_PG == 0 && efer & EFER_LME != 0 {
            let code_64 = self.vmcs.read(GUEST_CS_ACCESS_RIGHTS) & 1 << 13 != 0;
            if cr4 & CR4_PAE == 0 || code_64 {
                return false;
            }
            efer |= EFER_LMA;
        } else if !paging && old & CR0_PG != 0 {
            if self.in_64_bit_mode() || cr4 & CR4_PCIDE != 0 {
                return false;
            }
            efer &= !EFER_LMA;
        }
        let pae = paging && efer & EFER_LMA == 0 && cr4 & CR4_PAE != 0;
        if pae && !self.load_pdptes(host) {
            return false;
        }
        self.set_efer(efer);
        // CD and NW are kept for reading only: EPT gives the memory types, and no guest switches
        // the CPU's caches off.
        let real = value & CR0_GUEST_OWNED | CR0_ET | CR0_NE;
        self.vmcs.write(GUEST_CR0, real);
        self.vmcs.write(CR0_READ_SHADOW, value & known | CR0_ET);
        self.flush_tlb();
        true
    }

    /// Carries out MOV to CR4 where a host-owned bit changes; false for #GP(0).
    fn write_cr4(&mut self, host: &mut impl Host, value: u64) -> bool {
        if value & !self.vcpu.cr4.allowed != 0 {
            return false;
        }
        let long = self.vmcs.read(GUEST_IA32_EFER) & EFER_LMA != 0;
        let paging = self.guest_cr0() & CR0_PG != 0;
        if long && value & CR4_PAE == 0 {
            return false;
        }
        let sets_pcide = value & CR4_PCIDE != 0 && self.guest_cr4() & CR4_PCIDE == 0;
        if sets_pcide && (!long || self.vmcs.read(GUEST_CR3) & 0xfff != 0) {
            return false;
        }
        if paging && !long && value & CR4_PAE != 0 && !self.load_pdptes(host) {
            return false;
        }
        self.vmcs.write(GUEST_CR4, self.vcpu.cr4.real(value));
        self.vmcs.write(CR4_READ_SHADOW, value);
        self.flush_tlb();
        true
    }

    /// Stores EFER and keeps the "IA-32e mode guest" entry control equal to LMA.
    fn set_efer(&mut self, efer: u64) {
        self.vmcs.write(GUEST_IA32_EFER, efer);
        let control = Entry::IA32E_MODE_GUEST.bits();
        let entry = self.vmcs.read(ENTRY_CONTROLS);
        let entry = if efer & EFER_LMA != 0 { entry | control } else { entry & !control };
        self.vmcs.write(ENTRY_CONTROLS, entry);
    }

    /// Loads the PDPTEs that CR3 points to; false if one is bad. SDM volume 3, section "PDPTE
    /// Registers".
    fn load_pdptes(&mut self, host: &impl Host) -> bool {
        // Bits 8:5, 2, 1, and those above the physical-address width.
        let width = self.vcpu.cpuid.answer(0x8000_0008, 0).eax & 0xff;
        let reserved = 0x1e6 | u64::MAX.checked_shl(width).unwrap_or(0);
        let Some(table) = GuestPhysAddr::new(self.vmcs.read(GUEST_CR3) & 0xffff_ffe0) else {
            return false;
        };
        let mut bytes = [0; 32];
        if !host.memory().read(table, &mut bytes) {
            return false;
        }
        let mut entries = [0; 4];
        for (entry, bytes) in entries.iter_mut().zip(bytes.chunks_exact(8)) {
            *entry = bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        }
        if entries.iter().any(|entry| entry & 1 != 0 && entry & reserved != 0) {
            return false;
        }
        for (field, entry) in
            [GUEST_PDPTE0, GUEST_PDPTE1, GUEST_PDPTE2, GUEST_PDPTE3].into_iter().zip(entries)
        {
            self.vmcs.write(field, entry);
        }
        true
    }

    /// A guest's own change of paging flushes its translations; done for it, they must go too.
    pub(crate) fn flush_tlb(&mut self) {
        // SAFETY: a current VMCS proves VMX root operation.
        unsafe { invvpid_single_context(self.vmcs.read(VPID)) }
            .expect("INVVPID single-context is a required capability");
    }

    // ---- Instruction bytes ---------------------------------------------------------------------

    /// CR3, and the instruction at CS:RIP with its code size. Asked for the same place again, the
    /// answer is what stood there the first time, even if the guest has changed it since.
    #[inline(always)]
    pub(crate) fn instruction_at(
        &mut self,
        memory: &impl GuestRead,
        rip: u64,
    ) -> (u64, CodeSize, InstructionBytes) {
        let cs_base = self.vmcs.read(GUEST_CS_BASE);
        let cr3 = self.vmcs.read(GUEST_CR3);
        if let Some(last) = &self.vcpu.ac_place
            && (last.rip, last.cs_base, last.cr3) == (rip, cs_base, cr3)
        {
            return (cr3, last.code, last.instruction);
        }
        let instruction = self.read_instruction(memory, rip, cs_base);
        let code = self.code_size();
        self.vcpu.ac_place = Some(AcPlace { rip, cs_base, cr3, code, instruction });
        (cr3, code, instruction)
    }

    /// How the guest's code is executed.
    pub(crate) fn code_size(&self) -> CodeSize {
        if self.in_64_bit_mode() {
            CodeSize::Bits64
        } else if self.vmcs.read(GUEST_CS_ACCESS_RIGHTS) & RIGHTS_DEFAULT_BIG != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        }
    }

    pub(crate) fn read_instruction(
        &self,
        memory: &impl GuestRead,
        rip: u64,
        cs_base: u64,
    ) -> InstructionBytes {
        let long = self.in_64_bit_mode();
        let linear = if long { rip } else { cs_base.wrapping_add(rip) & 0xffff_ffff };
        let mut bytes = [0; 15];
        let mut done = 0;
        while done < bytes.len() {
            let at = linear.wrapping_add(done as u64);
            let Some(gpa) = self.translate(memory, at) else { break };
            let in_page = 4096 - (at & 0xfff) as usize;
            let end = bytes.len().min(done + in_page);
            if !memory.read(gpa, &mut bytes[done..end]) {
                break;
            }
            done = end;
        }
        InstructionBytes { bytes, len: done as u8 }
    }

    /// Where a linear address lies.
    fn translate(&self, memory: &impl GuestRead, linear: u64) -> Option<GuestPhysAddr> {
        let (paging, pdptes) = self.paging();
        translate(memory, paging, self.vmcs.read(GUEST_CR3), pdptes, linear)
    }

    /// How the guest translates, and its PDPTEs where it uses them.
    pub(crate) fn paging(&self) -> (Paging, [u64; 4]) {
        let cr4 = self.vmcs.read(GUEST_CR4);
        let mut pdptes = [0; 4];
        let paging = if self.vmcs.read(GUEST_CR0) & CR0_PG == 0 {
            Paging::Off
        } else if self.vmcs.read(GUEST_IA32_EFER) & EFER_LMA != 0 {
            Paging::FourLevel
        } else if cr4 & CR4_PAE != 0 {
            pdptes = [GUEST_PDPTE0, GUEST_PDPTE1, GUEST_PDPTE2, GUEST_PDPTE3]
                .map(|field| self.vmcs.read(field));
            Paging::Pae
        } else {
            Paging::Bits32 { page_size_extensions: cr4 & CR4_PSE != 0 }
        };
        (paging, pdptes)
    }

    /// Split-lock detection's part of [`crate::vcpu::Vcpu::load`]: call it once the vCPU is
    /// loaded and before it runs.
    ///
    /// # Errors
    ///
    /// MSR 0x33 faulted.
    pub fn load_sld(&mut self, pinned: &mut impl PreemptionDisabled, task: &mut Task) -> Written {
        self.vcpu.sld.load(pinned, task)
    }

    /// Split-lock detection's part of [`Self::put`]: call it before.
    ///
    /// # Errors
    ///
    /// MSR 0x33 faulted.
    pub fn put_sld(&mut self, pinned: &mut impl PreemptionDisabled, task: &mut Task) -> Written {
        self.vcpu.sld.put(pinned, task)
    }
}
