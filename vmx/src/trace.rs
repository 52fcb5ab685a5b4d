//! Split locks found by looking: where the CPU does not detect them, the guest is single-stepped, and
//! each instruction is looked at before it is executed.
//!
//! What is found leads to the verdict that an #AC of the CPU would have led to, and the guest sees the
//! same. Whatever the CPU would find wrong with the instruction before it accesses its operand, or with
//! the access, is the CPU's to raise: the instruction then is no split lock.
//!
//! What is not seen: accesses that are locked without the guest's instruction saying so (a
//! descriptor's accessed flag, flags in page tables); an instruction that another vCPU rewrites after
//! the look; one that is fetched by a translation which the guest has changed in its page tables
//! without telling the CPU; and an access by tables that lie where the guest has no memory.

use sld::{Source, Verdict};

use crate::emulate::operand::CodeSize;
use crate::emulate::paging::may_fetch;
use crate::emulate::{Locked, State};
use crate::fields::*;
use crate::instruction::now;
use crate::run::{
    BLOCKING_MOV_SS, End, Host, InstructionBytes, PENDING_DEBUG_BS, PENDING_DEBUG_ENABLED, Stop,
};
use crate::setup::*;
use crate::split_lock::{AcOutcome, AcReport, MAX_INSTRUCTION};
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
        let bytes = instruction.as_slice();
        let glance = glance(self.code_size(), bytes);
        if glance == Glance::Harmless {
            return Ok(true);
        }
        // What cannot be read faults, unless the CPU remembers otherwise.
        if (bytes.len() as u64) < MAX_INSTRUCTION {
            self.flush_tlb();
        }
        match glance {
            Glance::Suspicious => self.suspect(host, rip, instruction),
            Glance::Harmless | Glance::Short => Ok(true),
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
        let cr0 = self.vmcs.read(GUEST_CR0);
        let context = self.ac_context(cr0);
        let state = self.emulator_state(rip);
        match look(&state, instruction.as_slice(), host.memory()) {
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
        let (source, first) = (Source::Trace, false);
        let report = AcReport {
            source,
            rip,
            cr3: state.cr3,
            context,
            virtual_bit,
            outcome,
            first,
            code: state.code,
            instruction,
        };
        self.act_on(host, verdict, report, cr0, None)?;
        self.begin_wanted_step(host)?;
        self.follow_bit(host);
        // The preemption timer has stood still in most of the time that tracing took.
        if !self.vcpu.step.contains(Step::TRACE) {
            self.tick(now());
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::GuestPhysAddr;
    use crate::emulate::paging::Rights;
    use crate::walk::{GuestRead, Paging};
    use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind};
    use proptest::prelude::*;

    const CODES: [CodeSize; 3] = [CodeSize::Bits16, CodeSize::Bits32, CodeSize::Bits64];

    /// Bytes that are often prefixes and opcodes of instructions that lock.
    fn bytes() -> impl Strategy<Value = [u8; 15]> {
        let likely = [0xf0, 0x66, 0x67, 0xf2, 0xf3, 0x2e, 0x64, 0x48, 0x41, 0x86, 0x87, 0x0f, 0xff];
        let byte = prop_oneof![any::<u8>(), prop::sample::select(likely.to_vec())];
        prop::collection::vec(byte, 15).prop_map(|bytes| bytes.try_into().unwrap())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        /// What locks is suspicious, and nothing is that has neither the prefix nor is XCHG.
        #[test]
        fn a_glance_misses_nothing_that_locks(bytes in bytes(), length in 0usize..=15) {
            for code in CODES {
                let mut decoder =
                    Decoder::with_ip(code.bits(), &bytes, 0, DecoderOptions::NONE);
                let instruction = decoder.decode();
                let exchanges = instruction.mnemonic() == Mnemonic::Xchg
                    && instruction.op0_kind() == OpKind::Memory;
                let locks = !instruction.is_invalid() && (instruction.has_lock_prefix() || exchanges);
                let found = glance(code, &bytes);
                prop_assert!(!locks || found == Glance::Suspicious, "{bytes:x?}");
                if found == Glance::Suspicious && !instruction.is_invalid() {
                    prop_assert!(instruction.has_lock_prefix() || exchanges, "{bytes:x?}");
                }
                // Fewer bytes tell the same or nothing.
                let cut = glance(code, &bytes[..length]);
                prop_assert!(cut == found || cut == Glance::Short);
            }
        }
    }

    /// Guest memory from address 0 on.
    struct Flat(Vec<u8>);

    impl GuestRead for Flat {
        fn read(&self, gpa: GuestPhysAddr, buffer: &mut [u8]) -> bool {
            let start = gpa.as_u64() as usize;
            let source = self.0.get(start..start.saturating_add(buffer.len()));
            source.inspect(|source| buffer.copy_from_slice(source)).is_some()
        }
    }

    impl GuestWrite for Flat {
        fn write(&self, _: GuestPhysAddr, _: &[u8]) -> bool {
            panic!("a look changes nothing");
        }
    }

    fn state(code: CodeSize) -> State {
        State { code, ..crate::emulate::tests::state() }
    }

    /// LOCK ADD DWORD PTR [RBX], EAX.
    const ADD: [u8; 3] = [0xf0, 0x01, 0x03];

    fn looked(state: &State, bytes: &[u8]) -> Look {
        look(state, bytes, &Flat(Vec::new()))
    }

    #[test]
    fn what_crosses_a_line_is_a_split_lock() {
        // ADD, XCHG, CMPXCHG8B.
        for (bytes, size) in [(&ADD[..], 4), (&[0x87, 0x03], 4), (&[0xf0, 0x0f, 0xc7, 0x0b], 8)] {
            for address in 0u64..130 {
                let mut state = state(CodeSize::Bits64);
                state.registers[3] = address;
                let splits = address / 64 != (address + size - 1) / 64;
                let expected = if splits { Look::SplitLock } else { Look::Other };
                assert_eq!(looked(&state, bytes), expected, "{bytes:x?} {address:#x}");
            }
        }
        let mut state = state(CodeSize::Bits64);
        state.registers[3] = 0x3e;
        // Not locked; a register; LOCK on what cannot be locked.
        for bytes in [&[0x01, 0x03][..], &[0x87, 0xc3], &[0xf0, 0x89, 0x03]] {
            assert_eq!(looked(&state, bytes), Look::Other, "{bytes:x?}");
        }
        // CMPXCHG16B faults unless it is aligned, and then it does not cross.
        assert_eq!(looked(&state, &[0xf0, 0x48, 0x0f, 0xc7, 0x0b]), Look::Other);
    }

    #[test]
    fn what_faults_before_is_the_cpus_affair() {
        let split = |code| {
            let mut state = state(code);
            state.registers[3] = 0x3e;
            state
        };
        let mut state = split(CodeSize::Bits32);
        assert_eq!(looked(&state, &ADD), Look::SplitLock);
        state.segments[3].limit = 0x40;
        assert_eq!(looked(&state, &ADD), Look::Other, "limit of DS");
        let mut state = split(CodeSize::Bits32);
        state.segments[CS].limit = 0x1002;
        assert_eq!(looked(&state, &ADD), Look::SplitLock);
        state.segments[CS].limit = 0x1001;
        assert_eq!(looked(&state, &ADD), Look::Other, "limit of CS");
        let mut state = split(CodeSize::Bits64);
        state.segments[CS].limit = 0;
        assert_eq!(looked(&state, &ADD), Look::SplitLock);
        state.rip = 0x7fff_ffff_fffe;
        assert_eq!(looked(&state, &ADD), Look::Other, "RIP is not canonical at the end");
        state.rip = 0x8000_0000_0000;
        assert_eq!(looked(&state, &ADD), Look::Other, "nor at the beginning");
    }

    /// One page, by four levels: code and operand. `flags` are those of its entry.
    fn page(state: &mut State, flags: u64) -> Flat {
        let mut memory = Flat(vec![0; 0x5000]);
        let entries =
            [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x1000 | flags)];
        for (at, entry) in entries {
            memory.0[at..at + 8].copy_from_slice(&u64::to_le_bytes(entry));
        }
        (state.paging, state.cr3) = (Paging::FourLevel, 0x1000);
        state.registers[3] = 0x103e;
        memory
    }

    #[test]
    fn pages_decide_about_fetch_and_access() {
        const NX: u64 = 1 << 63;
        for (flags, user, smep, expected) in [
            (0b111, true, false, Look::SplitLock),
            (0b111, false, false, Look::SplitLock),
            (0b111, false, true, Look::Faults),
            (0b111, true, true, Look::SplitLock),
            (0b011, false, true, Look::SplitLock),
            (0b011, true, false, Look::Faults),
            (0b101, true, false, Look::Faults),
            (0b110, false, false, Look::Faults),
            (0b111 | NX, true, false, Look::Faults),
            (0b011 | NX, false, false, Look::Faults),
        ] {
            let mut state = state(CodeSize::Bits64);
            state.rights = Rights { user, smep, ..state.rights };
            let memory = page(&mut state, flags);
            assert_eq!(look(&state, &ADD, &memory), expected, "{flags:#x} {user} {smep}");
            // Its last byte stands on the next page, which is not there.
            state.rip = 0x1ffe;
            assert_eq!(look(&state, &ADD, &memory), Look::Faults);
        }
    }

    #[test]
    fn breakpoints_of_instructions_come_first() {
        let at = [0x1000, 0x2000, 0x3000, 0x4000];
        for (index, address) in (0..).zip(at) {
            for enable in [1u64, 2] {
                let dr7 = enable << (2 * index);
                assert!(is_executed(dr7, at, address));
                assert!(!is_executed(dr7, at, address + 1));
                assert!(!is_executed(dr7 | 1 << (16 + 4 * index), at, address), "of data");
                assert!(!is_executed(dr7 | 1 << (18 + 4 * index), at, address), "of two bytes");
            }
            assert!(!is_executed(0, at, address));
        }
    }
}
