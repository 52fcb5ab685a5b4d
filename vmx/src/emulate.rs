//! Split locks carried out in software: the read-modify-write happens on parts of a cache line each,
//! without the bus lock, while nobody else runs in the guest.
//!
//! Only what surely succeeds is carried out. Whatever would fault, and what is not understood, is
//! refused with nothing changed: the CPU is then to execute the instruction itself, and finds the same
//! fault. So no fault need be imitated here. A locked instruction that faults takes no bus lock.
//!
//! Source: SDM volume 2, the instructions' pages; volume 3, section "Locked Atomic Operations".

pub mod arithmetic;
pub mod operand;
pub mod paging;

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use crate::addr::GuestPhysAddr;
use crate::walk::{GuestWrite, Paging};
use arithmetic::{Operation, ZF};
use operand::{CodeSize, Segment, effective_address, linear_address, operand_size};
use paging::{Rights, Writable, translate_for_write};

/// The largest operand, in bytes.
const MAX_SIZE: usize = 16;
/// Bytes in a cache line.
const CACHE_LINE: u64 = 64;

/// Numbers of the registers that CMPXCHG, CMPXCHG8B and CMPXCHG16B use without naming them.
const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;

/// What an instruction works with and on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: in the order of their numbers.
    pub registers: [u64; 16],
    /// The instruction's own address, an offset into CS.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// How code is executed.
    pub code: CodeSize,
    /// CR0.PE is set, and it is not virtual-8086 mode.
    pub protected: bool,
    /// How linear addresses are translated.
    pub paging: Paging,
    /// CR3.
    pub cr3: u64,
    /// The PDPTEs that the CPU holds; used with PAE paging.
    pub pdptes: [u64; 4],
    /// What else decides about an access.
    pub rights: Rights,
    /// How many bits a canonical linear address has.
    pub linear_bits: u32,
}

/// Why an instruction is left to the CPU. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its bytes are no locked read-modify-write that is known here.
    Unknown,
    /// It faults.
    Faults,
}

/// An instruction that was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Its length in bytes.
    pub length: usize,
    /// The linear address of its operand.
    pub linear: u64,
    /// The operand's size in bytes.
    pub size: usize,
}

/// Carries out the instruction in `bytes`, a locked read-modify-write of memory, and changes `state`
/// (but for RIP) and `memory` as the CPU would have.
///
/// The caller keeps all others from the guest's memory meanwhile, and `bytes` are those that stand
/// there. Where the guest has no memory, ones are read, and what is written goes nowhere.
///
/// # Errors
///
/// [`Refusal`].
pub fn emulate(state: &mut State, bytes: &[u8], memory: &impl GuestWrite) -> Result<Done, Refusal> {
    let locked = Locked::decode(state, bytes)?;
    let Locked { ref instruction, kind, linear, size } = locked;
    let place = Place::of(state, memory, linear, size).ok_or(Refusal::Faults)?;
    let before = place.read(memory);
    let after = match kind {
        Kind::Plain(operation) => plain(state, instruction, operation, size, before)?,
        Kind::CompareTwice => compare_twice(state, size, before),
    };
    place.mark(memory);
    if after != before {
        place.write(memory, after);
    }
    Ok(Done { length: instruction.len(), linear, size })
}

/// Has the decoder make its tables now, and not at the first instruction of a guest: they are on the heap.
pub fn prepare() {
    let nop = Decoder::new(64, &[0x90], DecoderOptions::NONE).decode();
    debug_assert_eq!(nop.mnemonic(), Mnemonic::Nop);
}

/// A locked read-modify-write of memory that is not carried out yet.
#[derive(Debug, Clone)]
pub struct Locked {
    instruction: Instruction,
    kind: Kind,
    linear: u64,
    size: usize,
}

impl Locked {
    /// The instruction in `bytes`, at `state`'s RIP.
    ///
    /// # Errors
    ///
    /// [`Refusal::Faults`] where its operand cannot be accessed, whatever the page tables say.
    pub fn decode(state: &State, bytes: &[u8]) -> Result<Self, Refusal> {
        let options = DecoderOptions::NONE;
        let instruction = Decoder::with_ip(state.code.bits(), bytes, state.rip, options).decode();
        if instruction.is_invalid() || instruction.op0_kind() != OpKind::Memory {
            return Err(Refusal::Unknown);
        }
        let kind = Kind::of(&instruction).ok_or(Refusal::Unknown)?;
        let size = operand_size(&instruction);
        if size == 0 {
            return Err(Refusal::Unknown);
        }
        let offset = effective_address(&instruction, |number| state.registers[number]);
        let linear = linear_address(
            &instruction,
            &state.segments,
            state.code,
            state.protected,
            state.linear_bits,
            offset,
            size,
        );
        let linear = linear.ok_or(Refusal::Faults)?;
        if size == MAX_SIZE && !linear.is_multiple_of(MAX_SIZE as u64) {
            return Err(Refusal::Faults);
        }
        Ok(Self { instruction, kind, linear, size })
    }

    /// The instruction's length in bytes.
    pub fn length(&self) -> usize {
        self.instruction.len()
    }

    /// Whether its operand lies in two cache lines.
    pub fn is_split(&self) -> bool {
        (self.linear % CACHE_LINE) as usize + self.size > CACHE_LINE as usize
    }

    /// Whether the page tables let it read and write its operand.
    pub fn is_allowed(&self, state: &State, memory: &impl GuestWrite) -> bool {
        Place::of(state, memory, self.linear, self.size).is_some()
    }
}

/// What there is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain(Operation),
    /// CMPXCHG8B and CMPXCHG16B.
    CompareTwice,
}

impl Kind {
    /// `None` if the instruction is not locked, or not known.
    fn of(instruction: &Instruction) -> Option<Self> {
        let mnemonic = instruction.mnemonic();
        // XCHG with memory is locked without the prefix too.
        if !instruction.has_lock_prefix() && mnemonic != Mnemonic::Xchg {
            return None;
        }
        Some(Self::Plain(match mnemonic {
            Mnemonic::Inc => Operation::Inc,
            Mnemonic::Dec => Operation::Dec,
            Mnemonic::Neg => Operation::Neg,
            Mnemonic::Not => Operation::Not,
            Mnemonic::Add => Operation::Add,
            Mnemonic::Adc => Operation::Adc,
            Mnemonic::And => Operation::And,
            Mnemonic::Or => Operation::Or,
            Mnemonic::Sbb => Operation::Sbb,
            Mnemonic::Sub => Operation::Sub,
            Mnemonic::Xor => Operation::Xor,
            Mnemonic::Btc => Operation::Btc,
            Mnemonic::Btr => Operation::Btr,
            Mnemonic::Bts => Operation::Bts,
            Mnemonic::Xadd => Operation::Xadd,
            Mnemonic::Xchg => Operation::Xchg,
            Mnemonic::Cmpxchg => Operation::Cmpxchg,
            Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b => return Some(Self::CompareTwice),
            _ => return None,
        }))
    }
}

/// The memory operand, translated: one page, or two where it crosses from one to the next.
struct Place {
    first: Writable,
    /// The second page, and how many bytes lie in the first one.
    second: Option<(Writable, usize)>,
    size: usize,
}

impl Place {
    fn of(state: &State, memory: &impl GuestWrite, linear: u64, size: usize) -> Option<Self> {
        let translate = |linear| {
            let State { paging, cr3, pdptes, rights, .. } = *state;
            translate_for_write(memory, paging, cr3, pdptes, rights, linear)
        };
        let in_first = (4096 - (linear & 0xfff) as usize).min(size);
        let second = if in_first < size {
            let next = linear + in_first as u64;
            // After 4 GiB it goes on at address 0.
            let wraps = state.code != CodeSize::Bits64;
            let next = if wraps { next & 0xffff_ffff } else { next };
            Some((translate(next)?, in_first))
        } else {
            None
        };
        Some(Self { first: translate(linear)?, second, size })
    }

    /// The operand's parts: where each lies in memory and in the operand.
    fn parts(&self) -> impl Iterator<Item = (GuestPhysAddr, core::ops::Range<usize>)> {
        let split = self.second.map_or(self.size, |(_, in_first)| in_first);
        let second = self.second.map(|(page, _)| (page.gpa, split..self.size));
        core::iter::once((self.first.gpa, 0..split)).chain(second)
    }

    fn read(&self, memory: &impl GuestWrite) -> u128 {
        let mut bytes = [0; MAX_SIZE];
        for (gpa, range) in self.parts() {
            if !memory.read(gpa, &mut bytes[range.clone()]) {
                bytes[range].fill(0xff);
            }
        }
        u128::from_le_bytes(bytes)
    }

    fn write(&self, memory: &impl GuestWrite, value: u128) {
        let bytes = value.to_le_bytes();
        for (gpa, range) in self.parts() {
            // Without memory there it goes nowhere, as it would on a bus.
            memory.write(gpa, &bytes[range]);
        }
    }

    fn mark(&self, memory: &impl GuestWrite) {
        self.first.mark(memory);
        if let Some((second, _)) = &self.second {
            second.mark(memory);
        }
    }
}

/// Carries a [`Kind::Plain`] instruction out on the operand's value; its new value.
fn plain(
    state: &mut State,
    instruction: &Instruction,
    operation: Operation,
    size: usize,
    before: u128,
) -> Result<u128, Refusal> {
    let (source, value) = match (instruction.op_count(), instruction.op1_kind()) {
        (1, _) => (None, 0),
        (_, OpKind::Register) => {
            let register = General::of(instruction.op1_register()).ok_or(Refusal::Unknown)?;
            (Some(register), register.read(&state.registers))
        }
        _ => (None, instruction.immediate(1)),
    };
    let accumulator = General { number: RAX, shift: 0, size };
    let expected = accumulator.read(&state.registers);
    let outcome =
        arithmetic::execute(operation, size, before as u64, value, expected, state.rflags)
            .ok_or(Refusal::Unknown)?;
    state.rflags = outcome.flags;
    match (operation, source) {
        (Operation::Xadd | Operation::Xchg, Some(register)) => {
            register.write(&mut state.registers, outcome.source);
        }
        // The accumulator is written only if it is another value than expected.
        (Operation::Cmpxchg, _) if outcome.flags & ZF == 0 => {
            accumulator.write(&mut state.registers, outcome.accumulator);
        }
        _ => {}
    }
    Ok(outcome.memory.into())
}

/// CMPXCHG8B and CMPXCHG16B on an operand of `size` bytes; its new value.
fn compare_twice(state: &mut State, size: usize, before: u128) -> u128 {
    let half = size / 2;
    let part = |number| General { number, shift: 0, size: half };
    let pair = |registers: &[u64; 16], high, low| {
        let [high, low] = [high, low].map(|number| u128::from(part(number).read(registers)));
        high << (8 * half) | low
    };
    if pair(&state.registers, RDX, RAX) == before {
        state.rflags |= ZF;
        return pair(&state.registers, RCX, RBX);
    }
    state.rflags &= !ZF;
    part(RAX).write(&mut state.registers, before as u64);
    part(RDX).write(&mut state.registers, (before >> (8 * half)) as u64);
    before
}

/// A general register, or a part of one.
#[derive(Debug, Clone, Copy)]
struct General {
    number: usize,
    /// Where the part begins: 8 for AH, CH, DH, BH.
    shift: u32,
    /// In bytes.
    size: usize,
}

impl General {
    fn of(register: Register) -> Option<Self> {
        if !register.is_gpr() {
            return None;
        }
        let high = [Register::AH, Register::CH, Register::DH, Register::BH];
        Some(match high.iter().position(|high| *high == register) {
            Some(number) => Self { number, shift: 8, size: 1 },
            None => {
                let number = register.full_register().number();
                Self { number, shift: 0, size: register.size() }
            }
        })
    }

    fn mask(self) -> u64 {
        u64::MAX >> (64 - 8 * self.size)
    }

    fn read(self, registers: &[u64; 16]) -> u64 {
        registers[self.number] >> self.shift & self.mask()
    }

    /// Writing 32 bits clears the upper half, writing fewer leaves the rest alone: SDM volume 1,
    /// section "General-Purpose Registers in 64-Bit Mode".
    fn write(self, registers: &mut [u64; 16], value: u64) {
        let whole = &mut registers[self.number];
        let value = value & self.mask();
        *whole = match self.size {
            4 | 8 => value,
            _ => *whole & !(self.mask() << self.shift) | value << self.shift,
        };
    }
}

/// How long the instruction is that these bytes begin with; all of them if that cannot be told.
pub fn length(bytes: &[u8], code: CodeSize) -> usize {
    let instruction = Decoder::new(code.bits(), bytes, DecoderOptions::NONE).decode();
    if instruction.is_invalid() { bytes.len() } else { instruction.len() }
}

#[cfg(test)]
pub(crate) mod tests;
