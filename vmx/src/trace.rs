//! Split locks found by looking: where the CPU does not detect them, the guest is single-stepped, and
//! each instruction is looked at before it is executed.
//!
//! What is found leads to the verdict that an #AC of the CPU would have led to, and the guest sees the
//! same. Whatever the CPU would find wrong with the instruction before it accesses its operand, or with
//! the access, is the CPU's to raise: the instruction then is no split lock.
//!
//! What is not seen: accesses that are locked without the guest's instruction saying so (a
//! descriptor's accessed flag, flags in page tables); an instruction that another vCPU rewrites after
//! the look; and one that is fetched by a translation which the guest has changed in its page tables
//! without telling the CPU.

use sld::Verdict;

use crate::emulate::operand::CodeSize;
use crate::emulate::paging::may_fetch;
use crate::emulate::{Locked, State};
use crate::fields::*;
use crate::run::{
    BLOCKING_MOV_SS, End, Host, InstructionBytes, PENDING_DEBUG_BS, PENDING_DEBUG_ENABLED, Stop,
};
use crate::setup::*;
use crate::split_lock::{AcOutcome, AcReport};
use crate::vcpu::{Loaded, Step};
use crate::walk::GuestWrite;

/// What can be said of an instruction by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Glance {
    /// It locks nothing.
    Harmless,
    /// It has a LOCK prefix, or is XCHG with a memory operand.
    Suspicious,
    /// There are too few bytes to say.
    Short,
}

/// Most instructions need not be decoded.
fn glance(code: CodeSize, bytes: &[u8]) -> Glance {
    for (index, byte) in bytes.iter().enumerate() {
        match byte {
            0xf0 => return Glance::Suspicious,
            // Segments, operand size, address size, repetition.
            0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf2 | 0xf3 => {}
            // REX.
            0x40..=0x4f if code == CodeSize::Bits64 => {}
            0x86 | 0x87 => {
                return match bytes.get(index + 1) {
                    // ModRM: the operand is a register.
                    Some(0xc0..) => Glance::Harmless,
                    Some(_) => Glance::Suspicious,
                    None => Glance::Short,
                };
            }
            _ => return Glance::Harmless,
        }
    }
    Glance::Short
}

/// What the look at an instruction has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// It does not split a lock, or faults before.
    Other,
    /// By the guest's page tables it faults before, which the CPU is to find out, too.
    Faults,
    /// It splits a lock.
    SplitLock,
}

/// Looks at the instruction in `bytes`, which stand at `state`'s RIP.
fn look(state: &State, bytes: &[u8], memory: &impl GuestWrite) -> Look {
    let Ok(locked) = Locked::decode(state, bytes) else { return Look::Other };
    if !locked.is_split() || !is_inside(state, locked.length() as u64) {
        return Look::Other;
    }
    if is_fetched(state, locked.length() as u64, memory) && locked.is_allowed(state, memory) {
        Look::SplitLock
    } else {
        Look::Faults
    }
}

/// Whether `length` bytes at RIP are within the code segment, and canonical.
fn is_inside(state: &State, length: u64) -> bool {
    let last = state.rip.wrapping_add(length - 1);
    if state.code == CodeSize::Bits64 {
        let unused = 64 - state.linear_bits;
        let canonical = |address: u64| ((address << unused) as i64 >> unused) as u64 == address;
        return canonical(state.rip) && canonical(last);
    }
    last <= state.segments[CS].limit.into()
}

/// Whether the tables let the CPU fetch `length` bytes at RIP.
fn is_fetched(state: &State, length: u64, memory: &impl GuestWrite) -> bool {
    let State { paging, cr3, pdptes, rights, .. } = *state;
    [0, length - 1].into_iter().all(|offset| {
        let address = state.rip.wrapping_add(offset);
        let linear = match state.code {
            CodeSize::Bits64 => address,
            _ => state.segments[CS].base.wrapping_add(address) & 0xffff_ffff,
        };
        may_fetch(memory, paging, cr3, pdptes, rights, linear)
    })
}

/// CS among the segments.
const CS: usize = 1;

impl Loaded<'_> {
    /// Has the guest traced where that is wished, and looks at the instruction that it is going to
    /// execute. False if that was carried out in software: the next one is to be looked at.
    #[inline(always)]
    pub(crate) fn trace(&mut self, host: &mut impl Host) -> Result<bool, Stop> {
        if host.traces() || self.vcpu.step.contains(Step::TRACE) {
            self.trace_one(host)
        } else {
            Ok(true)
        }
    }

    #[cold]
    #[inline(never)]
    fn trace_one(&mut self, host: &mut impl Host) -> Result<bool, Stop> {
        self.follow_bit(host);
        if !self.vcpu.step.contains(Step::TRACE) {
            return Ok(true);
        }
        self.want_attention();
        // A step that has begun is for the instruction that was looked at.
        if self.vcpu.step.contains(Step::SPLIT_LOCK) || !self.is_next() {
            return Ok(true);
        }
        let rip = self.vmcs.read(GUEST_RIP);
        let cs_base = self.vmcs.read(GUEST_CS_BASE);
        let instruction = self.read_instruction(host.memory(), rip, cs_base);
        match glance(self.code_size(), instruction.as_slice()) {
            Glance::Harmless => Ok(true),
            // What cannot be read faults, unless the CPU remembers otherwise.
            Glance::Short => {
                self.flush_tlb();
                Ok(true)
            }
            Glance::Suspicious => self.suspect(host, rip, instruction),
        }
    }

    /// The guest is stepped while the software's bit is on.
    fn follow_bit(&mut self, host: &impl Host) {
        if host.traces() != self.vcpu.step.contains(Step::TRACE) {
            self.vcpu.step.toggle(Step::TRACE);
            self.set_monitor_trap();
        }
    }

    /// Whether the VM entry leads to the instruction at RIP, and not to an event before it.
    fn is_next(&self) -> bool {
        if self.entry_event().is_valid() {
            return false;
        }
        // In the shadow of MOV SS, debug exceptions have to wait: SDM volume 3, section "Masking
        // Exceptions and Interrupts When Switching Stacks".
        if self.vmcs.read(GUEST_INTERRUPTIBILITY) & BLOCKING_MOV_SS != 0 {
            return true;
        }
        let pending = self.vmcs.read(GUEST_PENDING_DEBUG);
        pending & (PENDING_DEBUG_BS | PENDING_DEBUG_ENABLED) == 0 && !self.is_breakpoint()
    }

    /// Whether an instruction breakpoint comes first: SDM volume 3, section "Instruction-Breakpoint
    /// Exception Condition".
    fn is_breakpoint(&self) -> bool {
        let dr7 = self.vmcs.read(GUEST_DR7);
        if dr7 & 0xff == 0 || self.vmcs.read(GUEST_RFLAGS) & RFLAGS_RF != 0 {
            return false;
        }
        let rip = self.vmcs.read(GUEST_RIP);
        let linear = if self.in_64_bit_mode() {
            rip
        } else {
            self.vmcs.read(GUEST_CS_BASE).wrapping_add(rip) & 0xffff_ffff
        };
        is_executed(dr7, self.debug_addresses(), linear)
    }

    fn suspect(
        &mut self,
        host: &mut impl Host,
        rip: u64,
        instruction: InstructionBytes,
    ) -> Result<bool, Stop> {
        let context = self.ac_context();
        match look(&self.emulator_state(rip), instruction.as_slice(), host.memory()) {
            Look::Other => return Ok(true),
            // The CPU may go by what it remembers of the tables.
            Look::Faults => {
                self.flush_tlb();
                return Ok(true);
            }
            // What crosses a line is misaligned: the CPU raises #AC by itself.
            Look::SplitLock if context.legacy() => return Ok(true),
            Look::SplitLock => {}
        }
        let (pinned, task) = host.sld();
        let verdict = self.vcpu.sld.on_ac(pinned, task, context).map_err(End::from)?;
        let virtual_bit = self.vcpu.sld.virtual_bit();
        let outcome = AcOutcome::Again;
        let report = AcReport { rip, context, virtual_bit, outcome, first: false, instruction };
        self.act_on(host, verdict, report, None)?;
        self.begin_wanted_step(host)?;
        self.follow_bit(host);
        let carried_out = matches!(verdict, Verdict::Emulate { .. })
            && !self.vcpu.step.contains(Step::SPLIT_LOCK);
        Ok(!carried_out)
    }
}

/// Whether a breakpoint that is enabled in `dr7` is for the instruction at `linear`.
fn is_executed(dr7: u64, addresses: [u64; 4], linear: u64) -> bool {
    (0..).zip(addresses).any(|(index, address)| {
        let enabled = dr7 >> (2 * index) & 3 != 0;
        // Of instructions, one byte long: both fields are 0.
        enabled && dr7 >> (16 + 4 * index) & 0xf == 0 && address == linear
    })
}
