//! Random locked instructions, each executed twice: on an operand that is aligned, and on one that
//! crosses a cache line or a page. Memory, registers and flags must come out the same.
//!
//! All instructions that can be locked, in 16-bit, 32-bit and 64-bit code, with operands of two, four and
//! eight bytes, all forms of addresses, and prefixes in any order. Not CMPXCHG16B, which faults
//! where it is not aligned.
//!
//! Command line: `count=N` operations (200), `seed=N`.
//!
//! Exit codes: success; 0x30 they differ; 0x31 an operation changed a register that it only
//! reads; 0x32 FS and GS have no bases.

#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::AtomicU64;

use guests::cpu::wrmsr;
use guests::exit::Failure;
use guests::random::Random;
use guests::segments::{self, CODE16_FLAT, CODE32};
use guests::{Boot, guest, println};

guest!(main);

const DIFFERENT: Failure =
    Failure::new(0x30, "a split operation does what an aligned one does not");
const CHANGED: Failure = Failure::new(0x31, "a register that is only read was changed");
const BASES: Failure = Failure::new(0x32, "the base of FS or GS cannot be set");

const FS_BASE: u32 = 0xC000_0100;
const GS_BASE: u32 = 0xC000_0101;
/// CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u64 = 0x8D5;
const LINE: u64 = 64;
const PAGE: u64 = 4096;
/// Bytes compared before and behind an operand.
const MARGIN: usize = 16;
/// Registers by number.
const AX: usize = 0;
const CX: usize = 1;
const DX: usize = 2;
const BX: usize = 3;
const SP: usize = 4;

/// Where operands lie, and the code.
#[repr(C, align(4096))]
struct Pages(UnsafeCell<[u8; 4 * PAGE as usize]>);
// SAFETY: one processor.
unsafe impl Sync for Pages {}

static SPLIT: Pages = Pages(UnsafeCell::new([0; 4 * PAGE as usize]));
static ALIGNED: Pages = Pages(UnsafeCell::new([0; 4 * PAGE as usize]));
static CODE: Pages = Pages(UnsafeCell::new([0; 4 * PAGE as usize]));

impl Pages {
    fn at(&self) -> u64 {
        self.0.get() as u64
    }
}

// ---- Execution ---------------------------------------------------------------------------------

/// General registers by number, and RFLAGS.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
struct Registers {
    general: [u64; 16],
    rflags: u64,
}

static CONTEXT: AtomicU64 = AtomicU64::new(0);
/// Far pointer: offset and selector.
static TARGET: AtomicU64 = AtomicU64::new(0);

/// Calls the code at `target`, offset in bits 31:0 and selector above, with these registers but RSP.
///
/// # Safety
///
/// It is code of that segment's size, it comes back by a far return of 32 bits, and changes nothing but
/// registers and what is the caller's.
#[unsafe(naked)]
unsafe extern "C" fn call(registers: *mut Registers, target: u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rip + {context}], rdi",
        "mov [rip + {target}], rsi",
        "push qword ptr [rdi + 128]",
        "popfq",
        "mov rax, [rdi]",
        "mov rcx, [rdi + 8]",
        "mov rdx, [rdi + 16]",
        "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]",
        "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]",
        "mov r9, [rdi + 72]",
        "mov r10, [rdi + 80]",
        "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]",
        "mov r13, [rdi + 104]",
        "mov r14, [rdi + 112]",
        "mov r15, [rdi + 120]",
        "mov rdi, [rdi + 56]",
        // Far call, 32 bits.
        "call fword ptr [rip + {target}]",
        "pushfq",
        "push rax",
        "mov rax, [rip + {context}]",
        "mov [rax + 8], rcx",
        "mov [rax + 16], rdx",
        "mov [rax + 24], rbx",
        "mov [rax + 40], rbp",
        "mov [rax + 48], rsi",
        "mov [rax + 56], rdi",
        "mov [rax + 64], r8",
        "mov [rax + 72], r9",
        "mov [rax + 80], r10",
        "mov [rax + 88], r11",
        "mov [rax + 96], r12",
        "mov [rax + 104], r13",
        "mov [rax + 112], r14",
        "mov [rax + 120], r15",
        "pop rcx",
        "mov [rax], rcx",
        "pop rcx",
        "mov [rax + 128], rcx",
        "push 2",
        "popfq",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        context = sym CONTEXT,
        target = sym TARGET,
    )
}

// ---- Generation --------------------------------------------------------------------------------

/// The size of code.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bits {
    Sixteen,
    ThirtyTwo,
    SixtyFour,
}

/// Opcodes, with what stands in ModRM's reg field.
#[derive(Clone, Copy)]
enum Op {
    /// With a register operand. A short opcode, or one behind 0F.
    Register { opcode: u8, escape: bool },
    /// With a number in the field, and an immediate operand of 0, 1 or, if it is 2, up to four bytes.
    Number { opcode: u8, escape: bool, number: u8, immediate: u8 },
}

const CMPXCHG: u8 = 0xB1;
const XADD: u8 = 0xC1;
const XCHG: u8 = 0x87;
const CMPXCHG8B: u8 = 0xC7;

/// Any instruction.
fn any_op(random: &mut Random) -> Op {
    // ADD, OR, ADC, SBB, AND, SUB, XOR.
    const ARITHMETIC: [u8; 7] = [0, 1, 2, 3, 4, 5, 6];
    let arithmetic = ARITHMETIC[random.below(7) as usize];
    // BTS, BTR, BTC.
    let bits = random.below(3) as u8;
    match random.below(11) {
        0 | 1 => Op::Register { opcode: arithmetic << 3 | 1, escape: false },
        2 => Op::Number { opcode: 0x83, escape: false, number: arithmetic, immediate: 1 },
        3 => Op::Number { opcode: 0x81, escape: false, number: arithmetic, immediate: 2 },
        // INC, DEC; NOT, NEG.
        4 => Op::Number { opcode: 0xFF, escape: false, number: bits & 1, immediate: 0 },
        5 => Op::Number { opcode: 0xF7, escape: false, number: 2 | bits & 1, immediate: 0 },
        6 => Op::Register { opcode: 0xAB + 8 * bits, escape: true },
        7 => Op::Number { opcode: 0xBA, escape: true, number: 5 + bits, immediate: 1 },
        8 => Op::Register { opcode: [XADD, CMPXCHG][bits as usize & 1], escape: true },
        9 => Op::Register { opcode: XCHG, escape: false },
        _ => Op::Number { opcode: CMPXCHG8B, escape: true, number: 1, immediate: 0 },
    }
}

/// How an address is made.
#[derive(Clone, Copy)]
enum Address {
    /// ModRM's rm field with 16-bit registers, and bytes of displacement.
    Sixteen { rm: u8, displacement: usize },
    /// Base, index with the shift of its scale, bytes of displacement.
    Registers { base: Option<usize>, index: Option<(usize, u8)>, displacement: usize },
    /// Relative to the next instruction.
    Relative,
}

/// Base and index of the 16-bit forms.
const FORMS: [(Option<usize>, Option<usize>); 8] = [
    (Some(BX), Some(6)),
    (Some(BX), Some(7)),
    (Some(5), Some(6)),
    (Some(5), Some(7)),
    (Some(6), None),
    (Some(7), None),
    (Some(5), None),
    (Some(BX), None),
];

/// An operation, for any place of its operand.
struct Operation {
    bits: Bits,
    op: Op,
    /// In bytes.
    size: usize,
    register: usize,
    address: Address,
    /// Bytes of an address: 2, 4, 8.
    address_bytes: usize,
    /// All prefixes but REX, in order.
    prefixes: [u8; 6],
    count: usize,
    segment_base: u64,
    displacement: i32,
    immediate: u32,
    /// How many operands before its place the address points, for a bit number that leads back.
    words: i64,
}

impl Operation {
    fn any(random: &mut Random, [fs, gs]: [u64; 2]) -> Self {
        let bits = [Bits::Sixteen, Bits::ThirtyTwo, Bits::SixtyFour, Bits::SixtyFour]
            [random.below(4) as usize];
        let long = bits == Bits::SixtyFour;
        let op = any_op(random);
        let is_8b = matches!(op, Op::Number { opcode: CMPXCHG8B, .. });
        let size = match random.below(if long { 3 } else { 2 }) {
            _ if is_8b => 8,
            0 => 2,
            1 => 4,
            _ => 8,
        };
        let registers = if long { 16 } else { 8 };
        let mut register = random.below(registers) as usize;
        while register == SP {
            register = random.below(registers) as usize;
        }
        let short = random.one_in(3);
        let address_bytes = match bits {
            Bits::SixtyFour => {
                if short {
                    4
                } else {
                    8
                }
            }
            Bits::ThirtyTwo => {
                if short {
                    2
                } else {
                    4
                }
            }
            Bits::Sixteen => {
                if short {
                    4
                } else {
                    2
                }
            }
        };
        // What the operation reads or writes besides.
        let taken = |number: usize| {
            number == SP
                || number == register
                || number == AX
                || is_8b && [CX, DX, BX].contains(&number)
        };
        let mut free = || loop {
            let number = random.below(registers) as usize;
            if !taken(number) {
                return number;
            }
        };
        let (base, index) = (free(), free());
        let address = match random.below(8) {
            _ if address_bytes == 2 => {
                let mut rm = random.below(8) as u8;
                let usable = |rm: u8| {
                    let (base, index) = FORMS[rm as usize];
                    !base.is_some_and(taken) && !index.is_some_and(taken)
                };
                while !usable(rm) {
                    rm = random.below(8) as u8;
                }
                Address::Sixteen { rm, displacement: random.below(3) as usize }
            }
            0 if long => Address::Relative,
            0 | 1 => Address::Registers { base: None, index: None, displacement: 4 },
            2 | 3 => Address::Registers {
                base: Some(base),
                index: None,
                displacement: [0, 1, 4][random.below(3) as usize],
            },
            4 => Address::Registers {
                base: None,
                index: Some((index, random.below(4) as u8)),
                displacement: 4,
            },
            _ if base == index => {
                Address::Registers { base: Some(base), index: None, displacement: 1 }
            }
            _ => Address::Registers {
                base: Some(base),
                index: Some((index, random.below(4) as u8)),
                displacement: [0, 1, 4][random.below(3) as usize],
            },
        };
        let mut operation = Self {
            bits,
            op,
            size,
            register,
            address,
            address_bytes,
            prefixes: [0; 6],
            count: 0,
            segment_base: 0,
            displacement: random.next() as i32 >> random.below(24),
            immediate: random.next() as u32,
            words: 0,
        };
        if operation.is_bit_string() {
            operation.words = random.below(9) as i64 - 4;
        }
        // An address of 16 bits needs a segment's base.
        let segment = if address_bytes == 2 { 1 + random.below(2) } else { random.below(4) };
        match segment {
            1 => operation.prefix(0x64),
            2 => operation.prefix(0x65),
            // DS, ES, SS: flat.
            3 => operation.prefix([0x3E, 0x26, 0x36][random.below(3) as usize]),
            _ => {}
        }
        operation.segment_base = [0, fs, gs, 0][segment as usize];
        if operation.address_bytes != [2, 4, 8][bits as usize] {
            operation.prefix(0x67);
        }
        // With all that there is, an instruction would be longer than 15 bytes.
        let is_long = matches!(op, Op::Number { immediate: 2, .. });
        let usual = if bits == Bits::Sixteen { 2 } else { 4 };
        if !is_8b && (size < 8 && size != usual || size == 8 && !is_long && random.one_in(8)) {
            operation.prefix(0x66);
        }
        if !matches!(op, Op::Register { opcode: XCHG, escape: false }) || random.one_in(2) {
            operation.prefix(0xF0);
        }
        for index in 1..operation.count {
            operation.prefixes.swap(index, random.below(index as u64 + 1) as usize);
        }
        operation
    }

    /// A bit number in a register counts from the address, over any distance.
    fn is_bit_string(&self) -> bool {
        matches!(self.op, Op::Register { opcode, escape: true } if ![XADD, CMPXCHG].contains(&opcode))
    }

    fn prefix(&mut self, prefix: u8) {
        self.prefixes[self.count] = prefix;
        self.count += 1;
    }

    /// Its registers, which are `registers` but for those that make the address.
    fn place(&self, registers: &mut Registers, operand: u64) {
        let offset = operand
            .wrapping_sub((self.words * self.size as i64) as u64)
            .wrapping_sub(self.segment_base);
        let general = &mut registers.general;
        let (base, index) = match self.address {
            Address::Relative => return,
            Address::Sixteen { rm, displacement } => {
                let (base, index) = FORMS[rm as usize];
                // Without displacement, 6 is one of 16 bits alone.
                let base = if rm == 6 && displacement == 0 { None } else { base };
                (base, index.map(|index| (index, 0)))
            }
            Address::Registers { base, index, .. } => (base, index),
        };
        let mut rest = offset.wrapping_sub(self.displacement_value() as u64);
        match (base, index) {
            (Some(base), index) => {
                if let Some((index, shift)) = index {
                    rest = rest.wrapping_sub(general[index] << shift);
                }
                general[base] = self.address_part(general[base], rest);
            }
            // The displacement makes up for it: see `assemble`.
            (None, Some((index, _))) => {
                general[index] = self.address_part(general[index], general[index] & 0xFF);
            }
            (None, None) => {}
        }
    }

    /// A register whose part that an address uses is `value`; the rest stays.
    fn address_part(&self, register: u64, value: u64) -> u64 {
        let mask = u64::MAX >> (64 - 8 * self.address_bytes);
        register & !mask | value & mask
    }

    /// The displacement, where it is free.
    fn displacement_value(&self) -> i64 {
        let bytes = match self.address {
            Address::Sixteen { rm: 6, displacement: 0 } | Address::Relative => 0,
            Address::Sixteen { displacement, .. } => displacement,
            Address::Registers { base, displacement: 0, .. }
                if base.is_some_and(|base| base & 7 == 5) =>
            {
                1
            }
            Address::Registers { displacement, .. } => displacement,
        };
        match bytes {
            0 => 0,
            1 => i64::from(self.displacement as i8),
            2 => i64::from(self.displacement as i16),
            _ => i64::from(self.displacement),
        }
    }

    /// Writes the code for an operand at this place, with the registers that [`Self::place`] made.
    fn assemble(&self, code: &mut Code, registers: &Registers, operand: u64) {
        let offset = operand
            .wrapping_sub((self.words * self.size as i64) as u64)
            .wrapping_sub(self.segment_base);
        self.prefixes[..self.count].iter().for_each(|prefix| code.put(*prefix));
        let (reg, opcode, escape, immediate) = match self.op {
            Op::Register { opcode, escape } => (self.register, opcode, escape, 0),
            Op::Number { opcode, escape, number, immediate } => {
                (number.into(), opcode, escape, immediate)
            }
        };
        let immediate = match immediate {
            2 if self.size > 2 => 4,
            other => usize::from(other),
        };
        let (base, index) = match self.address {
            Address::Registers { base, index, .. } => (base, index.map(|(index, _)| index)),
            _ => (None, None),
        };
        if self.bits == Bits::SixtyFour {
            let is_8b = opcode == CMPXCHG8B && escape;
            let high = |number: usize| (number >> 3) as u8;
            let rex = 0x40
                | u8::from(self.size == 8 && !is_8b) << 3
                | high(reg) << 2
                | index.map_or(0, high) << 1
                | base.map_or(0, high);
            if rex != 0x40 || self.immediate & 1 != 0 {
                code.put(rex);
            }
        }
        if escape {
            code.put(0x0F);
        }
        code.put(opcode);
        let reg = (reg as u8 & 7) << 3;
        match self.address {
            Address::Relative => {
                code.put(reg | 5);
                let next = code.at() + 4 + immediate as u64;
                code.bytes(offset.wrapping_sub(next), 4);
            }
            Address::Sixteen { rm: 6, displacement: 0 } => {
                code.put(reg | 6);
                code.bytes(offset, 2);
            }
            Address::Sixteen { rm, displacement } => {
                code.put((displacement as u8) << 6 | reg | rm);
                code.bytes(self.displacement_value() as u64, displacement);
            }
            // Without base and index, 64-bit code needs a SIB byte, since this is relative there.
            Address::Registers { base: None, index: None, .. } if self.bits != Bits::SixtyFour => {
                code.put(reg | 5);
                code.bytes(offset, 4);
            }
            Address::Registers { base, index, displacement } => {
                let sib_index = index.map_or(4, |(index, shift)| shift << 3 | index as u8 & 7);
                match base {
                    None => {
                        code.put(reg | 4);
                        code.put(sib_index << 3 | 5);
                        let indexed = index
                            .map_or(0, |(index, shift)| (registers.general[index] & 0xFF) << shift);
                        code.bytes(offset.wrapping_sub(indexed), 4);
                    }
                    Some(base) => {
                        let displacement = match displacement {
                            0 if base & 7 == 5 => 1,
                            other => other,
                        };
                        let mode = [0, 1, 0, 0, 2][displacement] << 6;
                        if index.is_some() || base & 7 == 4 {
                            code.put(mode | reg | 4);
                            code.put(sib_index << 3 | base as u8 & 7);
                        } else {
                            code.put(mode | reg | base as u8 & 7);
                        }
                        code.bytes(self.displacement_value() as u64, displacement);
                    }
                }
            }
        }
        code.bytes(self.immediate.into(), immediate);
        // Far return of 32 bits.
        if self.bits == Bits::Sixteen {
            code.put(0x66);
        }
        code.put(0xCB);
    }
}

/// Code that is being written.
struct Code {
    length: usize,
}

impl Code {
    fn put(&mut self, byte: u8) {
        // SAFETY: an instruction and a return are shorter than the buffer.
        unsafe { CODE.0.get().cast::<u8>().add(self.length).write_volatile(byte) };
        self.length += 1;
    }

    fn bytes(&mut self, value: u64, count: usize) {
        value.to_le_bytes().iter().take(count).for_each(|byte| self.put(*byte));
    }

    fn at(&self) -> u64 {
        CODE.at() + self.length as u64
    }

    fn print(&self) {
        // SAFETY: its start, which nothing writes meanwhile.
        let bytes = unsafe { CODE.0.get().cast::<[u8; 32]>().read_volatile() };
        println!("{:02x?}", &bytes[..self.length.min(32)]);
    }
}

// ---- Comparison --------------------------------------------------------------------------------

/// Bytes around an operand.
type Around = [u8; 2 * MARGIN + 8];

/// Executes an operation on an operand at this place; what was around it is `around` before and after.
fn execute(
    operation: &Operation,
    registers: &mut Registers,
    around: &mut Around,
    operand: u64,
) -> Code {
    let area = (operand - MARGIN as u64) as *mut Around;
    operation.place(registers, operand);
    let mut code = Code { length: 0 };
    operation.assemble(&mut code, registers, operand);
    let selector = match operation.bits {
        Bits::Sixteen => CODE16_FLAT,
        Bits::ThirtyTwo => CODE32,
        Bits::SixtyFour => segments::code(0),
    };
    // SAFETY: (1) the operand and its surroundings lie in this guest's own pages; (2) the code is one
    // instruction that changes them and registers but RSP, and a far return.
    unsafe {
        area.write_unaligned(*around);
        call(registers, CODE.at() | u64::from(selector) << 32);
        *around = area.read_unaligned();
    }
    code
}

/// An operation's outcome that does not depend on where its operand is.
fn compare(random: &mut Random, bases: [u64; 2]) -> Result<(), Failure> {
    let operation = Operation::any(random, bases);
    let size = operation.size as u64;
    let mut before = Registers { general: [0; 16], rflags: random.next() & ARITHMETIC | 2 };
    before.general.iter_mut().for_each(|register| *register = random.next());
    let mut around = [0; 2 * MARGIN + 8];
    around.iter_mut().for_each(|byte| *byte = random.next() as u8);
    // Operands that meet now and then.
    if random.one_in(2) {
        let mut operand = [0; 8];
        operand.copy_from_slice(&around[MARGIN..MARGIN + 8]);
        let operand = u64::from_le_bytes(operand);
        before.general[AX] = operand;
        if matches!(operation.op, Op::Number { opcode: CMPXCHG8B, .. }) {
            before.general[DX] = operand >> 32;
        }
    }
    if operation.is_bit_string() {
        let bits = 8 * size as i64;
        let number = operation.words * bits + random.below(bits as u64) as i64;
        let mask = u64::MAX >> (64 - 8 * size);
        let register = &mut before.general[operation.register];
        *register = *register & !mask | number as u64 & mask;
    }
    let line = SPLIT.at() + PAGE + LINE * random.below(PAGE / LINE);
    let line = if random.one_in(8) { SPLIT.at() + 2 * PAGE } else { line };
    let split = line - 1 - random.below(size - 1);
    let aligned = ALIGNED.at() + PAGE + LINE * random.below(PAGE / LINE) + 8 * random.below(7);

    let (mut first, mut second) = (before, before);
    let (mut here, mut there) = (around, around);
    execute(&operation, &mut first, &mut here, aligned);
    let code = execute(&operation, &mut second, &mut there, split);
    // The registers that make the address are where they were put.
    let (mut put_first, mut put_second) = (before, before);
    operation.place(&mut put_first, aligned);
    operation.place(&mut put_second, split);
    let registers = if operation.bits == Bits::SixtyFour { 16 } else { 8 };
    let mask = if operation.bits == Bits::SixtyFour { u64::MAX } else { 0xFFFF_FFFF };
    let mut same = here == there && (first.rflags ^ second.rflags) & ARITHMETIC == 0;
    for number in (0..registers).filter(|number| *number != SP) {
        let [first, second, was_first, was_second] =
            [&first, &second, &put_first, &put_second].map(|set| set.general[number] & mask);
        if was_first == was_second {
            same &= first == second;
        } else if first != was_first || second != was_second {
            code.print();
            return Err(CHANGED);
        }
    }
    if !same {
        code.print();
        println!("flags {:#x} and {:#x}", first.rflags, second.rflags);
        println!("aligned {here:02x?}\nsplit   {there:02x?}");
    }
    DIFFERENT.unless(same)
}

fn main(boot: &Boot) -> Result<(), Failure> {
    let count = boot.number("count").unwrap_or(200);
    let seed = boot.number("seed").unwrap_or(1);
    println!("{count} random locked operations, seed {seed}");
    let mut random = Random::new(seed, 0);
    // So that addresses of 16 bits reach both areas.
    let low = SPLIT.at().min(ALIGNED.at());
    let bases = [low - 0x1230, low - 0x2560];
    // SAFETY: flat segments; nothing uses FS and GS.
    unsafe {
        asm!("mov ds, {0:x}", "mov es, {0:x}", "mov ss, {0:x}", "mov fs, {0:x}", "mov gs, {0:x}",
            in(reg) u64::from(segments::data(0)));
        BASES.unless(wrmsr(FS_BASE, bases[0]).is_ok() && wrmsr(GS_BASE, bases[1]).is_ok())?;
    }
    for number in 0..count {
        compare(&mut random, bases).inspect_err(|_| println!("operation {number}"))?;
    }
    Ok(())
}
