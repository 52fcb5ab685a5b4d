//! What becomes of an #AC: the verdict, and how it is carried out.

use core::fmt;

use sld::{AcContext, Fallback, Source, Verdict};

use crate::emulate::operand::{CodeSize, Segment};
use crate::emulate::paging::Rights;
use crate::emulate::{self, Done, Refusal, State};
use crate::exit::{EventKind, InterruptionInfo, vector};
use crate::fields::*;
use crate::run::{Alone, End, Handled, Host, InstructionBytes, PENDING_DEBUG_ENABLED, Stop};
use crate::setup::*;
use crate::vcpu::{Loaded, Step};
use crate::world::register::RSP;

/// An #AC that a guest raised, and what was done about it.
#[derive(Debug, Clone, Copy)]
pub struct AcReport {
    /// Who raised it: the CPU, or whoever traces the guest.
    pub source: Source,
    /// The guest's RIP: an offset into CS.
    pub rip: u64,
    /// The guest's CR3.
    pub cr3: u64,
    /// Privilege level and alignment-check bits.
    pub context: AcContext,
    /// The guest's own bit 29.
    pub virtual_bit: bool,
    /// What was done.
    pub outcome: AcOutcome,
    /// This task has not been warned before, and is to be now.
    pub first: bool,
    /// How code was executed when the instruction was read.
    pub code: CodeSize,
    /// The instruction at RIP.
    pub instruction: InstructionBytes,
}

/// What was done about an #AC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcOutcome {
    /// The guest got it.
    Inject,
    /// Detection is off for this task from now on.
    Warn,
    /// The instruction was executed with detection off, and no other.
    Step,
    /// The instruction was carried out in software.
    Emulate,
    /// Nothing: something came between, or the instruction faulted otherwise. Should the guest execute
    /// it again, it raises #AC again.
    Again,
    /// The same, and the vCPU waits: its VM has had as many as it may have.
    Throttle,
    /// The VM ends.
    Kill,
    /// The VM ends: detection was off.
    KillBogus,
}

impl AcOutcome {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Inject,
        Self::Warn,
        Self::Step,
        Self::Emulate,
        Self::Again,
        Self::Throttle,
        Self::Kill,
        Self::KillBogus,
    ];

    /// The name used in events.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inject => "inject",
            Self::Warn => "warn",
            Self::Step => "step",
            Self::Emulate => "emulate",
            Self::Again => "again",
            Self::Throttle => "throttle",
            Self::Kill => "kill",
            Self::KillBogus => "kill-bogus",
        }
    }
}

impl fmt::Display for AcOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Of the segment registers, ES to GS, the number of FS.
const FS: usize = 4;
/// The longest instruction, in bytes.
pub(crate) const MAX_INSTRUCTION: u64 = 15;

/// DR7: bits 1:0 enable breakpoint 0, and so on; bits 17:16 say what it is for, 19:18 how long it is.
const DR7_CONDITION_SHIFT: u32 = 16;

impl Loaded<'_> {
    /// #AC: see the verdict table in [`sld::Vcpu::on_ac`].
    pub(crate) fn alignment_check(
        &mut self,
        host: &mut impl Host,
        info: InterruptionInfo,
    ) -> Handled {
        self.end_split_lock_step(host)?;
        let cr0 = self.vmcs.read(GUEST_CR0);
        let context = self.ac_context(cr0);
        let verdict = if host.is_aside() {
            host.real_ac(context)
        } else {
            let (pinned, task) = host.sld();
            self.vcpu.sld.on_ac(pinned, task, context)
        };
        let verdict = verdict.map_err(End::from)?;
        let rip = self.vmcs.read(GUEST_RIP);
        let (cr3, code, instruction) = self.instruction_at(host.memory(), rip);
        let virtual_bit = self.vcpu.sld.virtual_bit();
        let outcome = AcOutcome::Again;
        let (source, first) = (Source::Msr, false);
        let report =
            AcReport { source, rip, cr3, context, virtual_bit, outcome, first, code, instruction };
        self.act_on(host, verdict, report, cr0, Some(info))
    }

    /// What decides about an #AC, as it is now.
    #[inline(always)]
    pub(crate) fn ac_context(&self, cr0: u64) -> AcContext {
        AcContext {
            // DPL of SS: 3 in virtual-8086 mode, 0 in real mode.
            cpl: (self.vmcs.read(GUEST_SS_ACCESS_RIGHTS) >> 5 & 3) as u8,
            cr0_am: cr0 & CR0_AM != 0,
            eflags_ac: self.vmcs.read(GUEST_RFLAGS) & RFLAGS_AC != 0,
        }
    }

    /// Carries a verdict out. `exit`: the #AC's, if the CPU has raised it; otherwise it is raised here,
    /// before the instruction.
    #[inline(always)]
    pub(crate) fn act_on(
        &mut self,
        host: &mut impl Host,
        verdict: Verdict,
        report: AcReport,
        cr0: u64,
        exit: Option<InterruptionInfo>,
    ) -> Handled {
        match verdict {
            Verdict::Inject => {
                self.report(host, AcReport { outcome: AcOutcome::Inject, ..report });
                match exit {
                    Some(info) => self.keep_interrupted(info.nmi_unblocked_by_iret()),
                    // The handler finds it set, as after every fault: SDM volume 3, section "Resume
                    // Flag".
                    None => {
                        let flags = self.vmcs.read(GUEST_RFLAGS);
                        self.vmcs.write(GUEST_RFLAGS, flags | RFLAGS_RF);
                    }
                }
                let error = (cr0 & CR0_PE != 0).then_some(0);
                self.inject(EventKind::HardwareException, vector::AC, error, 0);
            }
            Verdict::Warn { first, real_bit } => {
                self.report(host, AcReport { outcome: AcOutcome::Warn, first, ..report });
                if let Some(written) = real_bit {
                    host.on_real_bit(written);
                }
                self.resume(exit);
            }
            Verdict::Step { first } => self.want_step(host, exit, AcReport { first, ..report })?,
            Verdict::Throttle { first, limit } => {
                let report = AcReport { first, ..report };
                if !host.may_split(limit) {
                    self.report(host, AcReport { outcome: AcOutcome::Throttle, ..report });
                    self.resume(exit);
                    return Err(Stop::Held);
                }
                self.want_step(host, exit, report)?;
            }
            Verdict::Emulate { first, fallback } => {
                self.emulate(host, exit, AcReport { first, ..report }, fallback)?;
            }
            Verdict::Kill => {
                self.report(host, AcReport { outcome: AcOutcome::Kill, ..report });
                return Err(End::SplitLock.into());
            }
            Verdict::KillBogus => {
                self.report(host, AcReport { outcome: AcOutcome::KillBogus, ..report });
                return Err(End::BogusAc.into());
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn report(&mut self, host: &mut impl Host, report: AcReport) {
        host.on_ac(&report);
        self.make_room(host);
    }

    /// The guest goes on where the #AC interrupted it, if it did.
    fn resume(&mut self, exit: Option<InterruptionInfo>) {
        if let Some(info) = exit {
            self.restore_nmi_blocking(info.nmi_unblocked_by_iret());
            self.requeue();
        }
    }

    // ---- Step --------------------------------------------------------------------------------

    /// The instruction is to be executed with detection off, once nothing else is due.
    fn want_step(
        &mut self,
        host: &mut impl Host,
        exit: Option<InterruptionInfo>,
        report: AcReport,
    ) -> Handled {
        self.resume(exit);
        self.vcpu.step.insert(Step::WANTED);
        self.vcpu.stepped = Some(report);
        self.want_attention();
        // As a rule nothing else is due, which would have kicked; the end of the turn can wait for one
        // instruction.
        if exit.is_some() && self.vcpu.step == Step::WANTED && !self.is_kicked() {
            self.begin_wanted_step(host)?;
            if self.vcpu.step == Step::SPLIT_LOCK {
                self.vcpu.step.insert(Step::BEGUN);
            }
        }
        Ok(())
    }

    /// Begins a step that is wanted.
    pub(crate) fn begin_wanted_step(&mut self, host: &mut impl Host) -> Handled {
        if !self.vcpu.step.contains(Step::WANTED) {
            return Ok(());
        }
        match host.begin_step().map_err(End::from)? {
            Alone::Yes => {
                self.vcpu.step.remove(Step::WANTED);
                self.vcpu.step.insert(Step::SPLIT_LOCK);
                self.set_monitor_trap();
                self.want_attention();
                Ok(())
            }
            // Given up with the turn.
            Alone::Held => Err(Stop::Held),
            Alone::Again => {
                self.give_up_step(host);
                // Nothing of a guest that is traced is executed before it was looked at again.
                if self.vcpu.step.contains(Step::TRACE) { Err(Stop::Slice) } else { Ok(()) }
            }
            Alone::Refused => Err(End::SplitLock.into()),
        }
    }

    /// A step that is wanted is not begun: the guest raises its #AC again.
    pub(crate) fn give_up_step(&mut self, host: &mut impl Host) {
        if self.vcpu.step.contains(Step::WANTED) {
            self.vcpu.step.remove(Step::WANTED);
            self.report_step(host, AcOutcome::Again);
        }
    }

    /// Detection is off for one VM entry at most, whatever the exit was.
    pub(crate) fn end_split_lock_step(&mut self, host: &mut impl Host) -> Handled {
        if self.vcpu.step.contains(Step::SPLIT_LOCK) {
            self.vcpu.step.remove(Step::SPLIT_LOCK | Step::BEGUN);
            host.end_step().map_err(End::from)?;
            self.set_monitor_trap();
            let rip = self.vmcs.read(GUEST_RIP);
            // A locked instruction never jumps. Its fault leads far away, or nowhere.
            let executed = self.vcpu.stepped.is_some_and(|report| {
                (1..=MAX_INSTRUCTION).contains(&rip.wrapping_sub(report.rip))
            });
            let outcome = if executed { AcOutcome::Step } else { AcOutcome::Again };
            self.report_step(host, outcome);
        }
        Ok(())
    }

    fn report_step(&mut self, host: &mut impl Host, outcome: AcOutcome) {
        if let Some(report) = self.vcpu.stepped.take() {
            self.report(host, AcReport { outcome, ..report });
        }
    }

    // ---- Emulation ---------------------------------------------------------------------------

    /// Carries the instruction out, with the VM's other vCPUs out of the guest.
    fn emulate(
        &mut self,
        host: &mut impl Host,
        exit: Option<InterruptionInfo>,
        report: AcReport,
        fallback: Fallback,
    ) -> Handled {
        // In the delivery of an event, what split is not the instruction at RIP.
        let delivers = || InterruptionInfo(self.vmcs.read(IDT_VECTORING_INFO)).is_valid();
        if exit.is_some() && delivers() {
            return self.fall_back(host, exit, report, fallback);
        }
        // Where no memory is, it does without what stands there for one instruction, and needs the
        // gate that this vCPU holds closed for it.
        if self.vcpu.step.contains(Step::HOLE) {
            self.step_done(host);
        }
        match host.stop_vm() {
            Alone::Yes => {}
            Alone::Refused => return Err(End::SplitLock.into()),
            Alone::Held | Alone::Again => {
                self.report(host, report);
                self.resume(exit);
                return Err(Stop::Held);
            }
        }
        let result = self.carry_out(host, report.rip);
        host.release_vm();
        // One of those that were held may wait for this very CPU.
        if self.is_kicked() {
            self.want_attention();
        }
        match result {
            Ok(()) => self.report(host, AcReport { outcome: AcOutcome::Emulate, ..report }),
            // By the tables as they are now. The CPU may go by what it remembers of them.
            Err(Refusal::Faults) => {
                self.report(host, report);
                self.resume(exit);
                self.flush_tlb();
            }
            Err(Refusal::Unknown) => return self.fall_back(host, exit, report, fallback),
        }
        Ok(())
    }

    /// What cannot be carried out is stepped, where detection may be off for that.
    fn fall_back(
        &mut self,
        host: &mut impl Host,
        exit: Option<InterruptionInfo>,
        report: AcReport,
        fallback: Fallback,
    ) -> Handled {
        match fallback {
            Fallback::Step => self.want_step(host, exit, report),
            Fallback::Kill => {
                self.report(host, AcReport { outcome: AcOutcome::Kill, ..report });
                Err(End::SplitLock.into())
            }
        }
    }

    fn carry_out(&mut self, host: &impl Host, rip: u64) -> Result<(), Refusal> {
        let memory = host.memory();
        let cs_base = self.vmcs.read(GUEST_CS_BASE);
        let instruction = self.read_instruction(memory, rip, cs_base);
        let mut state = self.emulator_state(rip);
        let done = emulate::emulate(&mut state, instruction.as_slice(), memory)?;
        let stack = core::mem::take(&mut state.registers[RSP]);
        self.vmcs.write(GUEST_RSP, stack);
        self.vcpu.state.registers = state.registers;
        self.vmcs.write(GUEST_RFLAGS, state.rflags & !RFLAGS_RF);
        self.skip_bytes(rip, done.length as u64);
        self.meet_breakpoints(done);
        Ok(())
    }

    pub(crate) fn emulator_state(&self, rip: u64) -> State {
        let mut registers = self.vcpu.state.registers;
        registers[RSP] = self.vmcs.read(GUEST_RSP);
        let in_64_bit_mode = self.in_64_bit_mode();
        let mut segments = [Segment::default(); 6];
        for (index, (segment, fields)) in segments.iter_mut().zip(GUEST_SEGMENTS).enumerate() {
            // 64-bit mode has no other segments than FS and GS, and these have no limits.
            if !in_64_bit_mode || index >= FS {
                segment.base = self.vmcs.read(fields.base);
            }
            if !in_64_bit_mode {
                segment.limit = self.vmcs.read(fields.limit);
                segment.rights = self.vmcs.read(fields.rights);
            }
        }
        let cr0 = self.vmcs.read(GUEST_CR0);
        let cr4 = self.vmcs.read(GUEST_CR4);
        let rflags = self.vmcs.read(GUEST_RFLAGS);
        let user = self.vmcs.read(GUEST_SS_ACCESS_RIGHTS) >> 5 & 3 == 3;
        let (paging, pdptes) = self.paging();
        State {
            registers,
            rip,
            rflags,
            segments,
            code: self.code_size(),
            protected: cr0 & CR0_PE != 0 && rflags & RFLAGS_VM == 0,
            paging,
            cr3: self.vmcs.read(GUEST_CR3),
            pdptes,
            rights: Rights {
                user,
                write_protect: cr0 & CR0_WP != 0,
                smap: cr4 & CR4_SMAP != 0 && rflags & RFLAGS_AC == 0,
                smep: cr4 & CR4_SMEP != 0,
                execute_disable: self.vmcs.read(GUEST_IA32_EFER) & EFER_NXE != 0,
                physical_bits: self.vcpu.cpuid.answer(0x8000_0008, 0).eax & 0xff,
            },
            // Five-level paging is not offered.
            linear_bits: 48,
        }
    }

    /// A data breakpoint that the access met traps after the instruction: SDM volume 3, section
    /// "Data Breakpoint Exception Conditions".
    fn meet_breakpoints(&mut self, done: Done) {
        let dr7 = self.vmcs.read(GUEST_DR7);
        if dr7 & 0xff == 0 {
            return;
        }
        let met = breakpoints_met(dr7, self.debug_addresses(), done);
        if met != 0 {
            let pending = self.vmcs.read(GUEST_PENDING_DEBUG);
            self.vmcs.write(GUEST_PENDING_DEBUG, pending | met | PENDING_DEBUG_ENABLED);
        }
    }
}

/// B0 to B3 for the breakpoints that are enabled in `dr7`, are for data, and overlap the access: SDM
/// volume 3, sections "Debug Control Register (DR7)" and "Breakpoint Field Recognition".
fn breakpoints_met(dr7: u64, addresses: [u64; 4], access: Done) -> u64 {
    let mut met = 0;
    for (index, address) in addresses.into_iter().enumerate() {
        let enabled = dr7 >> (2 * index) & 3 != 0;
        let field = dr7 >> (DR7_CONDITION_SHIFT as usize + 4 * index);
        let (is_data, length) = (field & 1 != 0, [1, 2, 8, 4][(field >> 2 & 3) as usize]);
        let start = address & !(length - 1);
        let overlaps = start < access.linear.wrapping_add(access.size as u64)
            && access.linear < start.wrapping_add(length);
        if enabled && is_data && overlaps {
            met |= 1 << index;
        }
    }
    met
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn breakpoints_are_met_by_bytes() {
        let access = Done { length: 3, linear: 0x103e, size: 4 };
        // Enabled locally or globally; write or read and write; one, two, four, eight bytes.
        let met = |enable: u64, field: u64, address| {
            breakpoints_met(enable << 4 | field << 24, [0, 0, address, 0], access)
        };
        for enable in [1, 2, 3] {
            assert_eq!(met(enable, 0b0001, 0x1041), 4);
        }
        assert_eq!(met(0, 0b0001, 0x1041), 0);
        assert_eq!(met(1, 0b0000, 0x1041), 0, "for instructions");
        assert_eq!(met(1, 0b0010, 0x1041), 0, "for ports");
        assert_eq!(met(1, 0b0011, 0x1041), 4);
        for (field, address, expected) in [
            (0b0001, 0x103d, 0),
            (0b0001, 0x103e, 4),
            (0b0001, 0x1042, 0),
            (0b0101, 0x103d, 0),
            (0b0101, 0x1043, 0),
            (0b0101, 0x1041, 4),
            (0b1101, 0x103b, 0),
            (0b1101, 0x103f, 4),
            (0b1101, 0x1043, 4),
            (0b1101, 0x1044, 0),
            (0b1001, 0x1038, 4),
            (0b1001, 0x1037, 0),
        ] {
            assert_eq!(met(1, field, address), expected, "{field:#b} {address:#x}");
        }
    }

    #[test]
    fn every_outcome_has_a_name_of_its_own() {
        let names = AcOutcome::ALL.map(AcOutcome::as_str);
        for (index, name) in names.iter().enumerate() {
            assert!(!names[..index].contains(name), "{name}");
        }
    }
}
