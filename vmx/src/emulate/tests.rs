//! The emulation against the CPU that runs the tests.

use std::cell::RefCell;
use std::sync::OnceLock;
use std::{vec, vec::Vec};

use proptest::prelude::*;

use super::*;
use crate::walk::GuestRead;

/// What the guest's memory is: some bytes from address 0 on.
struct Flat(RefCell<Vec<u8>>);

impl Flat {
    fn new(bytes: usize) -> Self {
        Self(RefCell::new(vec![0; bytes]))
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.0.borrow_mut()[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn entry(&self, at: u64) -> u64 {
        self.read_u64(GuestPhysAddr::new(at).unwrap()).unwrap()
    }
}

impl GuestRead for Flat {
    fn read(&self, gpa: GuestPhysAddr, buffer: &mut [u8]) -> bool {
        let start = gpa.as_u64() as usize;
        let memory = self.0.borrow();
        let Some(source) = memory.get(start..start.saturating_add(buffer.len())) else {
            return false;
        };
        buffer.copy_from_slice(source);
        true
    }
}

impl GuestWrite for Flat {
    fn write(&self, gpa: GuestPhysAddr, bytes: &[u8]) -> bool {
        let start = gpa.as_u64() as usize;
        let mut memory = self.0.borrow_mut();
        let Some(target) = memory.get_mut(start..start.saturating_add(bytes.len())) else {
            return false;
        };
        target.copy_from_slice(bytes);
        true
    }
}

/// A page of memory in which the CPU executes one instruction with registers, flags and an operand of
/// the test's choice. Offsets in it: code, registers, flags, operand.
struct Native(*mut u8);

const PAGE: usize = 4096;
const REGISTERS: usize = 0x400;
const FLAGS: usize = 0x480;
const SAVED_STACK: usize = 0x488;
/// In the middle of a cache line, so that nothing is split here.
const OPERAND: usize = 0x820;

impl Native {
    fn new() -> Self {
        // SAFETY: a fresh anonymous mapping.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        Self(page.cast())
    }

    fn address(&self, offset: usize) -> u64 {
        self.0 as u64 + offset as u64
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= PAGE);
        // SAFETY: within the mapping, which nobody else refers to.
        unsafe { self.0.add(offset).copy_from(bytes.as_ptr(), bytes.len()) };
    }

    fn get<const COUNT: usize>(&self, offset: usize) -> [u8; COUNT] {
        let mut bytes = [0; COUNT];
        // SAFETY: as for `put`.
        unsafe { bytes.as_mut_ptr().copy_from(self.0.add(offset), COUNT) };
        bytes
    }

    /// Executes `instruction`; registers (but for RSP) and flags as it left them.
    fn execute(
        &mut self,
        instruction: &[u8],
        registers: [u64; 16],
        flags: u64,
    ) -> ([u64; 16], u64) {
        let mut code = Vec::new();
        // Opcode bytes with a RIP-relative operand at this offset of the page.
        let relative = |code: &mut Vec<u8>, opcode: &[u8], field: u8, target: usize| {
            code.extend_from_slice(opcode);
            code.push(field << 3 | 5);
            let next = code.len() + 4;
            code.extend_from_slice(&(target as i32 - next as i32).to_le_bytes());
        };
        let is_stack = |number: usize| number == 4;
        let rex = |number: usize| if number < 8 { 0x48 } else { 0x4c };
        let all = (0..16).filter(|number| !is_stack(*number));
        // PUSH RBX, RBP, R12 to R15: the ABI's callee-saved registers.
        let saved: [&[u8]; 6] =
            [&[0x53], &[0x55], &[0x41, 0x54], &[0x41, 0x55], &[0x41, 0x56], &[0x41, 0x57]];
        saved.iter().for_each(|push| code.extend_from_slice(push));
        relative(&mut code, &[0x48, 0x89], 4, SAVED_STACK);
        relative(&mut code, &[0xff], 6, FLAGS);
        code.push(0x9d);
        for number in all.clone() {
            relative(&mut code, &[rex(number), 0x8b], number as u8 & 7, REGISTERS + 8 * number);
        }
        code.extend_from_slice(instruction);
        for number in all {
            relative(&mut code, &[rex(number), 0x89], number as u8 & 7, REGISTERS + 8 * number);
        }
        relative(&mut code, &[0x48, 0x8b], 4, SAVED_STACK);
        code.push(0x9c);
        relative(&mut code, &[0x8f], 0, FLAGS);
        code.push(0xfc);
        let restored: [&[u8]; 6] =
            [&[0x41, 0x5f], &[0x41, 0x5e], &[0x41, 0x5d], &[0x41, 0x5c], &[0x5d], &[0x5b]];
        restored.iter().for_each(|pop| code.extend_from_slice(pop));
        code.push(0xc3);
        assert!(code.len() <= REGISTERS);
        self.put(0, &code);
        for (number, value) in registers.iter().enumerate() {
            self.put(REGISTERS + 8 * number, &value.to_le_bytes());
        }
        self.put(FLAGS, &(flags & arithmetic::STATUS_FLAGS | 2).to_le_bytes());
        // SAFETY: the page holds a function that keeps to the ABI; the instruction under test touches
        // registers, flags and the operand.
        unsafe {
            let function: extern "sysv64" fn() = std::mem::transmute(self.0);
            function();
        }
        let mut after = registers;
        for (number, value) in after.iter_mut().enumerate().filter(|(n, _)| !is_stack(*n)) {
            *value = u64::from_le_bytes(self.get(REGISTERS + 8 * number));
        }
        (after, u64::from_le_bytes(self.get(FLAGS)) & arithmetic::STATUS_FLAGS)
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`.
        unsafe { libc::munmap(self.0.cast(), PAGE) };
    }
}

/// A guest in 64-bit mode, as far as its segments go, that may reach everything: no tables are walked.
pub(crate) fn state() -> State {
    State {
        registers: [0; 16],
        rip: 0x1000,
        rflags: 2,
        segments: [Segment { base: 0, limit: u32::MAX, rights: 0xc093 }; 6],
        code: CodeSize::Bits64,
        protected: true,
        paging: Paging::Off,
        cr3: 0,
        pdptes: [0; 4],
        rights: Rights {
            user: false,
            write_protect: true,
            smap: false,
            smep: false,
            execute_disable: true,
            physical_bits: 46,
        },
        linear_bits: 48,
    }
}

/// An instruction of the test: opcode bytes, ModRM's register field, operand size, immediate bytes.
#[derive(Debug, Clone)]
struct Form {
    opcode: Vec<u8>,
    register: u8,
    size: usize,
    immediate: usize,
    locked: bool,
}

fn forms() -> Vec<Form> {
    let mut forms = Vec::new();
    let mut add = |opcode: &[u8], register: Option<u8>, sizes: &[usize], immediate: usize| {
        let registers = register.map_or((0..16).filter(|r| *r != 4).collect(), |r| vec![r]);
        for &size in sizes {
            for &register in &registers {
                let opcode = opcode.to_vec();
                // An immediate is at most as long as the operand.
                let immediate = if immediate == 4 && size == 2 { 2 } else { immediate };
                forms.push(Form { opcode, register, size, immediate, locked: true });
            }
        }
    };
    let words = [2, 4, 8];
    for operation in 0..7u8 {
        // ADD OR ADC SBB AND SUB XOR; CMP would be 7.
        add(&[operation * 8], None, &[1], 0);
        add(&[operation * 8 + 1], None, &words, 0);
        add(&[0x80], Some(operation), &[1], 1);
        add(&[0x81], Some(operation), &words, 4);
        add(&[0x83], Some(operation), &words, 1);
    }
    for field in [0, 1] {
        add(&[0xfe], Some(field), &[1], 0);
        add(&[0xff], Some(field), &words, 0);
    }
    for field in [2, 3] {
        add(&[0xf6], Some(field), &[1], 0);
        add(&[0xf7], Some(field), &words, 0);
    }
    for opcode in [0xab, 0xb3, 0xbb] {
        add(&[0x0f, opcode], None, &words, 0);
    }
    for field in [5, 6, 7] {
        add(&[0x0f, 0xba], Some(field), &words, 1);
    }
    for opcode in [0xb0, 0xc0] {
        add(&[0x0f, opcode], None, &[1], 0);
        add(&[0x0f, opcode + 1], None, &words, 0);
    }
    add(&[0x0f, 0xc7], Some(1), &[4, 8], 0);
    add(&[0x86], None, &[1], 0);
    add(&[0x87], None, &words, 0);
    let unlocked = forms.iter().filter(|form| form.opcode[0] & 0xfe == 0x86).cloned();
    let unlocked: Vec<_> = unlocked.map(|form| Form { locked: false, ..form }).collect();
    forms.extend(unlocked);
    forms
}

impl Form {
    /// Encodes it with the operand at a register that it does not use otherwise, plus displacement;
    /// that register's number too. `rex`: with a prefix that is not needed, perhaps.
    fn encode(&self, displacement: i32, immediate: [u8; 4], rex: bool) -> (Vec<u8>, usize) {
        let base = match self.register {
            13 => 6u8,
            // As AH to BH, registers 4 to 7 are parts of others.
            7 if !rex => 6,
            _ if !rex => 7,
            _ => 13,
        };
        let mut code = Vec::new();
        if self.locked {
            code.push(0xf0);
        }
        if self.size == 2 {
            code.push(0x66);
        }
        let mut prefix = 0x40 | u8::from(base >= 8) | u8::from(self.register >= 8) << 2;
        if self.size == 8 {
            prefix |= 8;
        }
        // Without it, registers 4 to 7 of one byte are AH to BH.
        if prefix != 0x40 || rex {
            code.push(prefix);
        }
        code.extend_from_slice(&self.opcode);
        code.push(0x80 | (self.register & 7) << 3 | base & 7);
        code.extend_from_slice(&displacement.to_le_bytes());
        code.extend_from_slice(&immediate[..self.immediate]);
        (code, base.into())
    }

    /// The operand's size in memory.
    fn bytes(&self) -> usize {
        if self.opcode == [0x0f, 0xc7] { 2 * self.size } else { self.size }
    }

    fn is_bit_string(&self) -> bool {
        matches!(self.opcode[..], [0x0f, 0xab | 0xb3 | 0xbb])
    }
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(u64::MAX),
        Just(0x7f),
        Just(0x80),
        Just(0x7fff_ffff),
        Just(0x8000_0000),
        Just(1 << 63),
        Just((1 << 63) - 1),
        any::<u64>(),
        (0u64..4),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn everything_computes_what_the_cpu_computes(
        choice in any::<prop::sample::Index>(),
        mut registers in prop::array::uniform16(value()),
        operand in prop::array::uniform2(value()),
        flags in any::<u64>(),
        immediate in any::<[u8; 4]>(),
        displacement in -0x4000_0000i32..0x4000_0000,
        rex in any::<bool>(),
        equal in any::<bool>(),
    ) {
        static FORMS: OnceLock<Vec<Form>> = OnceLock::new();
        let form = choice.get(FORMS.get_or_init(forms));
        let (code, base) = form.encode(displacement, immediate, rex);
        let memory: [u8; 16] = operand.map(u64::to_le_bytes).concat().try_into().unwrap();
        if equal {
            // So that comparisons succeed now and then.
            let half = form.size;
            let mut low = [0; 8];
            low[..half].copy_from_slice(&memory[..half]);
            registers[RAX] = u64::from_le_bytes(low);
            let mut high = [0; 8];
            high[..half].copy_from_slice(&memory[half..2 * half]);
            registers[RDX] = u64::from_le_bytes(high);
        }
        if form.is_bit_string() {
            // The word must be the operand's own: the others are tried elsewhere.
            registers[usize::from(form.register)] %= 8 * form.size as u64;
        }
        let mut native = Native::new();
        let at = native.address(OPERAND).wrapping_sub(displacement as u64);
        registers[base] = at;
        native.put(OPERAND, &memory);
        let (expected, expected_flags) = native.execute(&code, registers, flags);
        let expected_memory: [u8; 16] = native.get(OPERAND);

        // The same with the operand across two pages, at the same linear address for all the
        // registers know.
        let split = 1 + registers[1] as usize % form.bytes().max(2);
        let guest = Flat::new(0x6000);
        let linear = native.address(OPERAND);
        let mut guest_state = state();
        guest_state.registers = registers;
        guest_state.rflags = flags & arithmetic::STATUS_FLAGS | 0x202;
        if form.bytes() == 16 {
            guest.put(OPERAND as u64, &memory);
            map(&guest, &mut guest_state, [(linear & !0xfff, 0)]);
        } else {
            // Moved so that the operand crosses from one page to the next.
            let moved = (0x1000 - split as u64).wrapping_sub(linear & 0xfff);
            guest_state.registers[base] = at.wrapping_add(moved);
            let linear = linear.wrapping_add(moved);
            guest.put(0x1000 - split as u64, &memory);
            let first = linear & !0xfff;
            map(&guest, &mut guest_state, [(first, 0), (first + 0x1000, 0x1000)]);
        }
        let done = emulate(&mut guest_state, &code, &guest);
        prop_assert_eq!(done.map(|done| (done.length, done.size)), Ok((code.len(), form.bytes())), "{:x?}", code);
        let mut found = guest_state.registers;
        // No instruction writes the base register, which the move has changed.
        prop_assert_eq!(expected[base], at);
        found[base] = at;
        prop_assert_eq!(found, expected, "{:x?}", code);
        prop_assert_eq!(guest_state.rflags & arithmetic::STATUS_FLAGS, expected_flags, "{:x?}", code);
        prop_assert_eq!(guest_state.rflags & !arithmetic::STATUS_FLAGS, 0x202);
        let start = if form.bytes() == 16 { OPERAND } else { 0x1000 - split };
        let mut found = [0; 16];
        guest.read(GuestPhysAddr::new(start as u64).unwrap(), &mut found);
        prop_assert_eq!(found, expected_memory, "{:x?}", code);
    }
}

/// Emulates `code` in `state` with 16 bytes of `fill` at `target`, flat and unpaged; where in
/// memory something has changed.
fn changed(state: &mut State, code: &[u8]) -> Result<Vec<usize>, Refusal> {
    let guest = Flat::new(0x2_0000);
    let done = emulate(state, code, &guest)?;
    assert_eq!(done.length, code.len());
    let memory = guest.0.borrow();
    Ok((0..memory.len()).filter(|at| memory[*at] != 0).collect())
}

#[test]
fn addresses_are_formed_as_in_each_mode() {
    use CodeSize::{Bits16, Bits32, Bits64};
    let [rbx, rsi, rdi, rbp] = [3, 6, 7, 5];
    // Mode, code, registers, the address of the byte that LOCK INC makes 1.
    type Case<'a> = (CodeSize, &'a [u8], &'a [(usize, u64)], usize);
    let cases: &[Case<'_>] = &[
        // [BX+SI+0x12], wrapping at 64 KiB.
        (Bits16, &[0xf0, 0xfe, 0x40, 0x12], &[(rbx, 0xfff0), (rsi, 0x1_1000)], 0x1002),
        // [0x1234]
        (Bits16, &[0xf0, 0xfe, 0x06, 0x34, 0x12], &[], 0x1234),
        // [EBX+ESI*4] in 16-bit code.
        (Bits16, &[0x67, 0xf0, 0xfe, 0x04, 0xb3], &[(rbx, 0x100), (rsi, 0x20)], 0x180),
        // [EBX-0x10]
        (Bits32, &[0xf0, 0xfe, 0x43, 0xf0], &[(rbx, 0x1010)], 0x1000),
        // [DI+0x10] in 32-bit code.
        (Bits32, &[0x67, 0xf0, 0xfe, 0x45, 0x10], &[(rdi, 0xdead_1000)], 0x1010),
        // [0x1234]
        (Bits32, &[0xf0, 0xfe, 0x05, 0x34, 0x12, 0, 0], &[], 0x1234),
        // [RIP+0x100]: from the next instruction on, at 0x1007.
        (Bits64, &[0xf0, 0xfe, 0x05, 0, 1, 0, 0], &[], 0x1107),
        // [0x1234] by an address of 32 bits without registers.
        (Bits64, &[0xf0, 0xfe, 0x04, 0x25, 0x34, 0x12, 0, 0], &[], 0x1234),
        // [EBX+EBP*8]: only 32 bits count.
        (Bits64, &[0x67, 0xf0, 0xfe, 0x04, 0xeb], &[(rbx, 0xffff_ffff_0000_0008), (rbp, 1)], 0x10),
        // [R12+R13*2+0x40], prefixes in an odd order.
        (Bits64, &[0x2e, 0xf0, 0x43, 0xfe, 0x44, 0x6c, 0x40], &[(12, 0x100), (13, 0x10)], 0x160),
    ];
    for (code_size, code, registers, expected) in cases {
        let mut state = State { code: *code_size, ..state() };
        for (number, value) in *registers {
            state.registers[*number] = *value;
        }
        assert_eq!(changed(&mut state, code), Ok(vec![*expected]), "{code:x?}");
    }
}

#[test]
fn bit_strings_reach_beyond_the_operand_in_both_directions() {
    // LOCK BTS [RBX], with AX, EAX, RAX as bit number.
    let forms: [(&[u8], u64); 3] = [
        (&[0x66, 0xf0, 0x0f, 0xab, 0x03], 0xffff_ffff_ffff_0000),
        (&[0xf0, 0x0f, 0xab, 0x03], 0xffff_ffff_0000_0000),
        (&[0xf0, 0x48, 0x0f, 0xab, 0x03], 0),
    ];
    for (code, above) in forms {
        for number in [0i64, 7, 8, 15, 16, 63, 64, 1000, 32767, -1, -16, -64, -1000, -32768] {
            let mut state = state();
            state.registers[3] = 0x8000;
            state.registers[0] = number.cast_unsigned() & !above | above;
            let expected = 0x8000 + number.div_euclid(8);
            assert_eq!(changed(&mut state, code), Ok(vec![expected as usize]), "{number}");
        }
    }
}

#[test]
fn segments_are_added_and_their_limits_kept() {
    // LOCK INC DWORD PTR FS:[EBX]
    let code = [0x64, 0xf0, 0xff, 0x03];
    let run = |segment: Segment, offset: u64, code_size, protected| {
        let mut state = State { code: code_size, protected, ..state() };
        state.segments[4] = segment;
        state.registers[3] = offset;
        changed(&mut state, &code)
    };
    use CodeSize::{Bits32, Bits64};
    let data = Segment { base: 0x1000, limit: 0xfff, rights: 0x93 };
    assert_eq!(run(data, 0xffc, Bits32, true), Ok(vec![0x1ffc]));
    assert_eq!(run(data, 0xffd, Bits32, true), Err(Refusal::Faults));
    assert_eq!(run(data, 0xffff_fffe, Bits32, true), Err(Refusal::Faults));
    // In 64-bit mode FS has a base and no limit.
    assert_eq!(run(data, 0xffd, Bits64, true), Ok(vec![0x1ffd]));
    let down = Segment { rights: 0x97, ..data };
    assert_eq!(run(down, 0xfff, Bits32, true), Err(Refusal::Faults));
    assert_eq!(run(down, 0x1000, Bits32, true), Ok(vec![0x2000]));
    assert_eq!(run(down, 0xfffc, Bits32, true), Ok(vec![0x1_0ffc]));
    assert_eq!(run(down, 0xfffd, Bits32, true), Err(Refusal::Faults));
    let big = Segment { rights: 0x4097, ..data };
    assert_eq!(run(big, 0xfffd, Bits32, true), Ok(vec![0x1_0ffd]));
    // Read-only, code, null selector, not present: only where rights are looked at.
    for rights in [0x91, 0x9b, 0x1_0093, 0x13] {
        let segment = Segment { rights, ..data };
        assert_eq!(run(segment, 0, Bits32, true), Err(Refusal::Faults), "{rights:#x}");
        assert_eq!(run(segment, 0, Bits32, false), Ok(vec![0x1000]), "{rights:#x}");
    }
    // DS has no base in 64-bit mode.
    let mut flat = state();
    flat.segments[3] = data;
    flat.registers[3] = 0x3000;
    assert_eq!(changed(&mut flat, &[0xf0, 0xff, 0x03]), Ok(vec![0x3000]));
    // Linear addresses wrap at 4 GiB, also within an access: to the ones where no memory is, one is
    // added, and carried to address 0.
    let top = Segment { base: 0xffff_f000, limit: u32::MAX, rights: 0xc093 };
    assert_eq!(run(top, 0x2000, Bits32, true), Ok(vec![0x1000]));
    assert_eq!(run(top, 0xffe, Bits32, true), Ok(vec![0]));
    let flat = Segment { base: 0, ..top };
    assert_eq!(run(flat, 0xffff_fffe, Bits32, true), Ok(vec![0]));
}

#[test]
fn addresses_that_are_not_canonical_fault() {
    let code = [0xf0, 0x48, 0xff, 0x03];
    let run = |address, linear_bits| {
        let mut state = State { linear_bits, ..state() };
        state.registers[3] = address;
        emulate(&mut state, &code, &Flat::new(8))
    };
    for (address, linear_bits) in
        [(0x7fff_ffff_fff9, 48), (0x8000_0000_0000, 48), (1 << 56, 57), (u64::MAX - 6, 48)]
    {
        assert_eq!(run(address, linear_bits), Err(Refusal::Faults), "{address:#x}");
    }
    for (address, linear_bits) in
        [(0x7fff_ffff_fff8, 48), (0xffff_8000_0000_0000, 48), (0x8000_0000_0000, 57)]
    {
        assert!(run(address, linear_bits).is_ok(), "{address:#x}");
    }
}

#[test]
fn what_is_no_locked_instruction_is_left_alone() {
    let cases: [&[u8]; 12] = [
        // Not locked.
        &[0xff, 0x03],
        &[0x0f, 0xc1, 0x03],
        // LOCK where it is not allowed: NOP, MOV, CMP, a register operand, BT.
        &[0xf0, 0x90],
        &[0xf0, 0x89, 0x03],
        &[0xf0, 0x39, 0x03],
        &[0xf0, 0xff, 0xc3],
        &[0xf0, 0x0f, 0xa3, 0x03],
        // XCHG of registers.
        &[0x87, 0xc3],
        // Cut off.
        &[],
        &[0xf0],
        &[0xf0, 0xff],
        &[0xf0, 0x81, 0x03, 1, 2, 3],
    ];
    for code in cases {
        let mut found = state();
        assert_eq!(changed(&mut found, code), Err(Refusal::Unknown), "{code:x?}");
        assert_eq!(found, state(), "{code:x?}");
    }
    // CMPXCHG16B wants its operand aligned.
    let mut found = state();
    found.registers[3] = 0x1008;
    let before = found.clone();
    assert_eq!(changed(&mut found, &[0xf0, 0x48, 0x0f, 0xc7, 0x0b]), Err(Refusal::Faults));
    assert_eq!(found, before);
}

#[test]
fn absent_memory_reads_as_ones_and_takes_nothing() {
    // XADD DWORD PTR [RBX], EAX: two bytes are there, two are not.
    let guest = Flat::new(0x1000);
    let mut state = state();
    state.registers[3] = 0xffe;
    state.registers[0] = 0x1_0001;
    assert!(emulate(&mut state, &[0xf0, 0x0f, 0xc1, 0x03], &guest).is_ok());
    assert_eq!(state.registers[0], 0xffff_0000);
    // The parts of one access are of one kind or the other, but a part is never half.
    assert_eq!(guest.0.borrow()[0xffe..], [0x01, 0x00]);
}

/// Every combination of rights in four-level tables, for user and supervisor, against the manual's rules
/// written as one condition.
#[test]
fn rights_are_those_of_all_levels_together() {
    let (writable, user_page, accessed, dirty) = (2u64, 4u64, 0x20u64, 0x40u64);
    for bits in 0..1u32 << 7 {
        let bit = |number: u32| bits >> number & 1 != 0;
        let [directory_writable, directory_user, page_writable, page_user] = [0, 1, 2, 3].map(bit);
        let rights = Rights { user: bit(4), write_protect: bit(5), smap: bit(6), ..state().rights };
        let guest = Flat::new(0x6000);
        let mut state = State { rights, ..state() };
        map(&guest, &mut state, [(0, 0)]);
        let flag = |on, flag| if on { flag } else { 0 };
        let directory = (TABLES + 0x3000)
            | 1
            | flag(directory_writable, writable)
            | flag(directory_user, user_page);
        let page = 1 | flag(page_writable, writable) | flag(page_user, user_page);
        for (at, entry) in [
            (TABLES, (TABLES + 0x1000) | 7),
            (TABLES + 0x1000, (TABLES + 0x2000) | 7),
            (TABLES + 0x2000, directory),
            (TABLES + 0x3000, page),
        ] {
            guest.put(at, &entry.to_le_bytes());
        }
        let is_user_page = directory_user && page_user;
        let is_writable = directory_writable && page_writable;
        let allowed = (is_writable || !rights.user && !rights.write_protect)
            && (is_user_page || !rights.user)
            && !(is_user_page && !rights.user && rights.smap);
        state.registers[3] = 0x100;
        let result = emulate(&mut state, &[0xf0, 0xff, 0x03], &guest);
        assert_eq!(result.is_ok(), allowed, "{rights:x?} {directory:#x} {page:#x}");
        let marks = [TABLES, TABLES + 0x2000, TABLES + 0x3000]
            .map(|at| guest.entry(at) & (accessed | dirty));
        let expected = if allowed { [accessed, accessed, accessed | dirty] } else { [0; 3] };
        assert_eq!(marks, expected);
    }
}

#[test]
fn both_pages_are_looked_at_before_anything_changes() {
    for missing in [0x1000, 0x2000] {
        let guest = Flat::new(0x6000);
        let mut state = state();
        map(&guest, &mut state, [(0x1000, 0), (0x2000, 0x1000)]);
        let entry = TABLES + 0x3000 + missing / 0x1000 * 8;
        // Present, and not writable.
        guest.put(entry, &(guest.entry(entry) & !2).to_le_bytes());
        state.registers[3] = 0x1ffe;
        let memory = guest.0.borrow().clone();
        let before = state.clone();
        let result = emulate(&mut state, &[0xf0, 0xff, 0x03], &guest);
        assert_eq!(result, Err(Refusal::Faults));
        assert_eq!(*guest.0.borrow(), memory);
        assert_eq!(state, before);
    }
}

#[test]
fn pae_and_32_bit_tables_and_large_pages() {
    let run = |paging, cr3, pdptes, entries: &[(u64, u64, usize)], linear| {
        let guest = Flat::new(0x2_0000);
        for (at, entry, bytes) in entries {
            guest.put(*at, &entry.to_le_bytes()[..*bytes]);
        }
        let mut state = State { paging, cr3, pdptes, ..state() };
        state.code = CodeSize::Bits32;
        state.registers[3] = linear;
        let result = emulate(&mut state, &[0xf0, 0xfe, 0x03], &guest);
        result.map(|_| {
            let found = guest.0.borrow()[0x1_0000..].iter().position(|byte| *byte != 0);
            0x1_0000 + found.unwrap()
        })
    };
    let small = Paging::Bits32 { page_size_extensions: true };
    let tables = [(0x1004, 0x2003, 4), (0x2008, 0x1_0003, 4)];
    assert_eq!(run(small, 0x1000, [0; 4], &tables, 0x40_2123), Ok(0x1_0123));
    let large = [(0x1004, 0x83, 4)];
    assert_eq!(run(small, 0x1000, [0; 4], &large, 0x41_0123), Ok(0x1_0123));
    // Bit 21 of a 4-MiB page's entry is reserved.
    let reserved = [(0x1004, 0x20_0083, 4)];
    assert_eq!(run(small, 0x1000, [0; 4], &reserved, 0x41_0123), Err(Refusal::Faults));
    let pdptes = [0x1001, 0x2001, 0, 0];
    let tables = [(0x2008, 0x3003, 8), (0x3010, 0x1_0003, 8)];
    assert_eq!(run(Paging::Pae, 0, pdptes, &tables, 0x4020_2123), Ok(0x1_0123));
    assert_eq!(run(Paging::Pae, 0, pdptes, &tables, 0x8020_2123), Err(Refusal::Faults));
    let large = [(0x2000, 0x83, 8)];
    assert_eq!(run(Paging::Pae, 0, pdptes, &large, 0x4001_0123), Ok(0x1_0123));
    for reserved in [1 << 13, 1 << 52, 1 << 46] {
        let tables = [(0x2000, 0x83 | reserved, 8)];
        assert_eq!(run(Paging::Pae, 0, pdptes, &tables, 0x4001_0123), Err(Refusal::Faults));
    }
}

/// Where page tables are in the guest's memory.
const TABLES: u64 = 0x2000;

/// Maps linear pages to guest-physical ones by four levels; all in one GiB.
fn map<const COUNT: usize>(guest: &Flat, state: &mut State, pages: [(u64, u64); COUNT]) {
    state.paging = Paging::FourLevel;
    state.cr3 = TABLES;
    for (linear, target) in pages {
        let index = |level: u32| (linear >> (12 + 9 * level) & 0x1ff) * 8;
        guest.put(TABLES + index(3), &((TABLES + 0x1000) | 3).to_le_bytes());
        guest.put(TABLES + 0x1000 + index(2), &((TABLES + 0x2000) | 3).to_le_bytes());
        guest.put(TABLES + 0x2000 + index(1), &((TABLES + 0x3000) | 3).to_le_bytes());
        let at = TABLES + 0x3000 + index(0);
        guest.put(at, &(target | 3).to_le_bytes());
    }
}
