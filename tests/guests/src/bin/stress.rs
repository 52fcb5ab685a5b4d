//! Works for ever on all CPUs, each by pseudo-random numbers of its own: locked additions, all
//! registers across exits, ports, IPIs, halting, memory that is not there, and split locks. What it
//! gets is compared with what it must get. The hypervisor ends it.
//!
//! Words of the command line:
//!
//! | word | |
//! |---|---|
//! | `role=unaware` | knows nothing of split-lock detection; all split locks happen |
//! | `role=aware` | turns its detection on and off, if it is offered: with it on a split lock raises #AC at any CPL, with it off it happens |
//! | `role=legacy` | CR0.AM is on: at CPL 3 with EFLAGS.AC a split lock raises #AC, and so does any other misaligned access; at CPL 0 it happens |
//! | `role=calm` | splits no lock |
//! | `vcpus=N` | how many CPUs there must be |
//! | `seed=N` | of the numbers |
//! | `calm=N` | the first N rounds of each CPU split no lock |
//! | `held` | splits only such locks as must raise #AC |
//! | `rounds=N` | the guest ends itself with success when each CPU has done so many |
//!
//! Without a role it is `calm`. Of three CPUs or more the last one halts now and then, until another
//! one wakes it; the others never halt.
//!
//! Split locks that must always raise #AC are in functions whose names start with `split_detected_`,
//! those that may happen in ones that start with `split_allowed_`: where one happened, or raised
//! #AC, tells which it was.
//!
//! Prints a line at the start. Anything wrong ends the guest with another line, `stress: FAILED WHAT
//! cpu=N round=N`, and a code from 0x30 to 0x3F, see the constants; what ends it in any other way is
//! the runtime's.

#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::hint;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use guests::cpu::{
    self, CR0_AM, EFLAGS_AC, SPLIT_LOCK_DETECT, TEST_CTRL, cpuid, disable_interrupts,
    enable_interrupts, halt, rdmsr, wrmsr,
};
use guests::exit::{self, Failure};
use guests::random::Random;
use guests::ring::{Ring, in_ring};
use guests::segments::{self, CODE16_FLAT, CODE32, CODE32_RING3};
use guests::smp::{self, Ipi, MAX_CPUS, To, arrived, cpus, send, start_others, this_cpu};
use guests::trap::{self, Exception, Run, vector};
use guests::{Boot, guest, println, probe};

guest!(main);

const CPUS: Failure = Failure::new(0x30, "number-of-cpus");
const ROLE: Failure = Failure::new(0x31, "role");
const XADD: Failure = Failure::new(0x32, "shared-counter");
const LANE: Failure = Failure::new(0x33, "shared-bits");
const OWN: Failure = Failure::new(0x34, "own-memory");
const REGISTERS: Failure = Failure::new(0x35, "registers");
const VALUE: Failure = Failure::new(0x36, "split-value");
const EXCEPTION: Failure = Failure::new(0x37, "split-raised-ac");
const NO_EXCEPTION: Failure = Failure::new(0x38, "split-raised-no-ac");
const WRONG_EXCEPTION: Failure = Failure::new(0x39, "wrong-exception");
const HAPPENED: Failure = Failure::new(0x3A, "split-happened-despite-ac");
const TEST_CTRL_VALUE: Failure = Failure::new(0x3B, "msr-0x33");
const MISALIGNED: Failure = Failure::new(0x3C, "misaligned-raised-no-ac");
const ABSENT: Failure = Failure::new(0x3D, "absent-memory");
const PORT: Failure = Failure::new(0x3E, "port");
const WOKEN: Failure = Failure::new(0x3F, "woken-by-nobody");

/// Wakes the CPU that halts.
const WAKE: u8 = 0x40;
/// A port at which nobody has anything.
const PORT_OF_NOBODY: u16 = 0xE0;
/// IA32_BIOS_SIGN_ID
const BIOS_SIGN_ID: u32 = 0x8B;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Unaware,
    Aware,
    Legacy,
    Calm,
}

impl Role {
    const ALL: [(&str, Self); 4] = [
        ("unaware", Self::Unaware),
        ("aware", Self::Aware),
        ("legacy", Self::Legacy),
        ("calm", Self::Calm),
    ];
}

/// What the command line says.
struct Settings {
    /// Index into [`Role::ALL`].
    role: AtomicUsize,
    seed: AtomicU64,
    calm: AtomicU64,
    held: AtomicBool,
    rounds: AtomicU64,
}

static SETTINGS: Settings = Settings {
    role: AtomicUsize::new(0),
    seed: AtomicU64::new(0),
    calm: AtomicU64::new(0),
    held: AtomicBool::new(false),
    rounds: AtomicU64::new(0),
};
/// How many CPUs have done their rounds.
static FINISHED: AtomicU64 = AtomicU64::new(0);
/// Where there is no memory.
static ABSENT_AT: AtomicU64 = AtomicU64::new(0);

/// Words that all CPUs change, in one cache line.
#[repr(C, align(64))]
struct Shared {
    counter: AtomicU64,
    /// Four bits for each CPU.
    lanes: AtomicU64,
}

static SHARED: Shared = Shared { counter: AtomicU64::new(0), lanes: AtomicU64::new(0) };

/// Words of a CPU's own, in one cache line.
#[repr(C, align(64))]
struct Own {
    sum: AtomicU64,
    value: AtomicU64,
}

static OWNS: [Own; MAX_CPUS] =
    [const { Own { sum: AtomicU64::new(0), value: AtomicU64::new(0) } }; MAX_CPUS];

/// Two pages of a CPU's own, in which its split locks lie, and a page that all use.
#[repr(C, align(4096))]
struct Arena(UnsafeCell<[u8; 8192]>);
// SAFETY: accessed by raw pointers only; what a CPU shares it accesses by locked instructions.
unsafe impl Sync for Arena {}

static ARENAS: [Arena; MAX_CPUS] = [const { Arena(UnsafeCell::new([0; 8192])) }; MAX_CPUS];
static SHARED_ARENA: Arena = Arena(UnsafeCell::new([0; 8192]));

/// Lanes as those of [`Shared`], across two cache lines.
fn split_lanes() -> *mut u8 {
    SHARED_ARENA.0.get().cast::<u8>().wrapping_add(64 - 3)
}

// ---- split locks ----

/// Functions that execute a locked instruction with a 32-bit register operand on memory, in 64-bit
/// mode at the CPL that they are called at. They take RFLAGS, and change the register operand.
macro_rules! sites {
    ($mark:literal: $($name:ident, $instruction:literal;)*) => {$(
        #[unsafe(no_mangle)]
        #[inline(never)]
        fn $name(operand: *mut u8, register: &mut u64, rflags: u64) -> Run {
            let mut value = *register;
            // The mark makes functions differ that do the same, so that they stay apart.
            // SAFETY: the operand is the caller's.
            let run = unsafe {
                probe!(
                    rflags,
                    [concat!($instruction, " // ", $mark)],
                    operand = in(reg) operand,
                    value = inout(reg) value
                )
            };
            *register = value;
            run
        }
    )*};
}

sites! { "detected":
    split_detected_add, "lock add [{operand}], {value:e}";
    split_detected_xchg, "xchg [{operand}], {value:e}";
    split_detected_xadd, "lock xadd [{operand}], {value}";
    split_detected_legacy, "lock xor [{operand}], {value:e}";
}

sites! { "allowed":
    split_allowed_add, "lock add [{operand}], {value:e}";
    split_allowed_xchg, "xchg [{operand}], {value:e}";
    split_allowed_xadd, "lock xadd [{operand}], {value}";
    // The bit of that number; gives what it was.
    split_allowed_flip, "lock btc [{operand}], {value}; setc {value:l}";
}

/// Functions that execute LOCK ADD of a 32-bit register to memory in compatibility mode, with 32 or
/// 16 bits, at the ring of the segments. They take the operand's address, the register and
/// [`trap::recovery`], and give the instruction's address.
macro_rules! outside {
    ($($name:ident, $code:literal, $far_return:literal, $segment:expr, $ring:literal;)*) => {$(
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        unsafe extern "C" fn $name(operand: u64, value: u64, recovery: *mut u64) -> u64 {
            naked_asm!(
                // What is above 32 bits does not survive (SDM volume 1, "General-Purpose Registers
                // in 64-Bit Mode").
                "push rbx",
                "push rbp",
                "push r12",
                "push r13",
                "push r14",
                "push r15",
                // Since an outer ring ran these may be null, which only 64-bit mode bears.
                "mov eax, {data}",
                "mov ds, eax",
                "mov ss, eax",
                "lea rax, [rip + 4f]",
                "mov [rdx], rax",
                // The way back.
                "sub rsp, 8",
                "lea rax, [rip + 5f]",
                "mov [rsp], eax",
                "mov dword ptr [rsp + 4], {code64}",
                // The way there.
                "push {segment}",
                "lea rax, [rip + 3f]",
                "push rax",
                "retfq",
                $code,
                "3:",
                "lock add dword ptr [edi], esi",
                "4:",
                $far_return,
                ".code64",
                "5:",
                "mov edx, edx",
                "mov qword ptr [rdx], 0",
                "lea rax, [rip + 3b]",
                "pop r15",
                "pop r14",
                "pop r13",
                "pop r12",
                "pop rbp",
                "pop rbx",
                "ret",
                data = const segments::data($ring),
                code64 = const segments::code($ring),
                segment = const $segment,
            )
        }
    )*};
}

outside! {
    split_detected_code32, ".code32", "retf", CODE32, 0;
    split_detected_code32_ring3, ".code32", "retf", CODE32_RING3, 3;
    split_detected_code16, ".code16", ".byte 0x66, 0xCB", CODE16_FLAT, 0;
    split_allowed_code32, ".code32", "retf", CODE32, 0;
    split_allowed_code32_ring3, ".code32", "retf", CODE32_RING3, 3;
    split_allowed_code16, ".code16", ".byte 0x66, 0xCB", CODE16_FLAT, 0;
}

/// A function of [`outside!`].
type OutsideSite = unsafe extern "C" fn(u64, u64, *mut u64) -> u64;

fn run_outside(site: OutsideSite, operand: *mut u8, register: u64) -> Run {
    // SAFETY: the operand is the caller's, and all addresses are below 4 GiB.
    let at = unsafe { site(operand as u64, register, trap::recovery()) };
    Run { at, rflags: 2, caught: trap::take() }
}

/// A misaligned access that is not locked.
#[inline(never)]
fn misaligned(operand: *mut u8) -> Run {
    // SAFETY: reads what is the caller's.
    unsafe {
        probe!(
            EFLAGS_AC | 2,
            ["mov {value:e}, [{operand}]"],
            operand = in(reg) operand,
            value = inout(reg) 0_u64 => _
        )
    }
}

/// The operations of split locks: what becomes of memory and register.
#[derive(Clone, Copy)]
enum Operation {
    Add,
    Xchg,
    /// With eight bytes.
    Xadd,
    Legacy,
    /// LOCK ADD in compatibility mode.
    Code32,
    Code16,
}

impl Operation {
    fn bytes(self) -> usize {
        if matches!(self, Self::Xadd) { 8 } else { 4 }
    }

    /// Memory and register behind it.
    fn result(self, memory: u64, register: u64) -> (u64, u64) {
        let low = |value: u64| value & 0xFFFF_FFFF;
        match self {
            Self::Add => (low(memory + register), register),
            Self::Code32 | Self::Code16 => (low(memory + register), register),
            Self::Xchg => (register, memory),
            Self::Xadd => (memory.wrapping_add(register), memory),
            Self::Legacy => (memory ^ register, register),
        }
    }

    /// Executes it at this CPL.
    fn execute(self, detected: bool, operand: *mut u8, register: &mut u64, rflags: u64) -> Run {
        let ring3 = cpl() == 3;
        let outside = match (self, detected, ring3) {
            (Self::Code32, true, false) => split_detected_code32 as OutsideSite,
            (Self::Code32, true, true) => split_detected_code32_ring3,
            (Self::Code32, false, false) => split_allowed_code32,
            (Self::Code32, false, true) => split_allowed_code32_ring3,
            (Self::Code16, true, _) => split_detected_code16,
            (Self::Code16, false, _) => split_allowed_code16,
            (Self::Add, true, _) => return split_detected_add(operand, register, rflags),
            (Self::Add, false, _) => return split_allowed_add(operand, register, rflags),
            (Self::Xchg, true, _) => return split_detected_xchg(operand, register, rflags),
            (Self::Xchg, false, _) => return split_allowed_xchg(operand, register, rflags),
            (Self::Xadd, true, _) => return split_detected_xadd(operand, register, rflags),
            (Self::Xadd, false, _) => return split_allowed_xadd(operand, register, rflags),
            (Self::Legacy, ..) => return split_detected_legacy(operand, register, rflags),
        };
        run_outside(outside, operand, *register)
    }
}

fn cpl() -> u16 {
    let cs: u16;
    // SAFETY: reads CS.
    unsafe { asm!("mov {:x}, cs", out(reg) cs, options(nomem, nostack, preserves_flags)) };
    cs & 3
}

// ---- registers ----

/// Registers that have to survive.
#[repr(C, align(64))]
#[derive(Clone, Copy, PartialEq, Eq)]
struct Registers {
    xmm: [u128; 16],
    /// RAX, RCX, RDX, RBX, RBP, RSI, RDI, R8 to R15.
    general: [u64; 15],
    rflags: u64,
}

impl Registers {
    const ZERO: Self = Self { xmm: [0; 16], general: [0; 15], rflags: 0 };
    /// CF, PF, AF, ZF, SF, OF.
    const FLAGS: u64 = 0x8D5;
}

/// Loads all registers from `wanted`, calls `action`, stores all to `found`.
#[unsafe(naked)]
unsafe extern "C" fn carry(
    wanted: *const Registers,
    found: *mut Registers,
    action: unsafe extern "C" fn(),
) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "push rsi",
        "push rdx",
        "movaps xmm0, [rdi]", "movaps xmm1, [rdi + 16]",
        "movaps xmm2, [rdi + 32]", "movaps xmm3, [rdi + 48]",
        "movaps xmm4, [rdi + 64]", "movaps xmm5, [rdi + 80]",
        "movaps xmm6, [rdi + 96]", "movaps xmm7, [rdi + 112]",
        "movaps xmm8, [rdi + 128]", "movaps xmm9, [rdi + 144]",
        "movaps xmm10, [rdi + 160]", "movaps xmm11, [rdi + 176]",
        "movaps xmm12, [rdi + 192]", "movaps xmm13, [rdi + 208]",
        "movaps xmm14, [rdi + 224]", "movaps xmm15, [rdi + 240]",
        "pushfq",
        "and qword ptr [rsp], ~{flags}",
        "mov rax, [rdi + 376]",
        "or [rsp], rax",
        "popfq",
        "mov rax, [rdi + 256]", "mov rcx, [rdi + 264]", "mov rdx, [rdi + 272]",
        "mov rbx, [rdi + 280]", "mov rbp, [rdi + 288]", "mov rsi, [rdi + 296]",
        "mov r8, [rdi + 312]", "mov r9, [rdi + 320]", "mov r10, [rdi + 328]",
        "mov r11, [rdi + 336]", "mov r12, [rdi + 344]", "mov r13, [rdi + 352]",
        "mov r14, [rdi + 360]", "mov r15, [rdi + 368]", "mov rdi, [rdi + 304]",
        "call [rsp]",
        "pushfq",
        "push rax",
        "mov rax, [rsp + 24]",
        "mov [rax + 264], rcx",
        "pop rcx",
        "mov [rax + 256], rcx",
        "pop rcx",
        "mov [rax + 376], rcx",
        "mov [rax + 272], rdx", "mov [rax + 280], rbx", "mov [rax + 288], rbp",
        "mov [rax + 296], rsi", "mov [rax + 304], rdi", "mov [rax + 312], r8",
        "mov [rax + 320], r9", "mov [rax + 328], r10", "mov [rax + 336], r11",
        "mov [rax + 344], r12", "mov [rax + 352], r13", "mov [rax + 360], r14",
        "mov [rax + 368], r15",
        "movaps [rax], xmm0", "movaps [rax + 16], xmm1",
        "movaps [rax + 32], xmm2", "movaps [rax + 48], xmm3",
        "movaps [rax + 64], xmm4", "movaps [rax + 80], xmm5",
        "movaps [rax + 96], xmm6", "movaps [rax + 112], xmm7",
        "movaps [rax + 128], xmm8", "movaps [rax + 144], xmm9",
        "movaps [rax + 160], xmm10", "movaps [rax + 176], xmm11",
        "movaps [rax + 192], xmm12", "movaps [rax + 208], xmm13",
        "movaps [rax + 224], xmm14", "movaps [rax + 240], xmm15",
        "add rsp, 16",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        flags = const Registers::FLAGS,
    )
}

/// Something to do, or nothing for a while, that leaves all registers and flags as they are.
type Action = unsafe extern "C" fn();

macro_rules! action {
    ($name:ident, $code:literal $(, $operand:ident = $kind:tt $value:expr)* $(,)?) => {
        #[unsafe(naked)]
        unsafe extern "C" fn $name() {
            naked_asm!($code, $($operand = $kind $value),*)
        }
    };
}

action!(
    identify,
    "push rax; push rbx; push rcx; push rdx; mov eax, 0; cpuid; pop rdx; pop rcx; pop rbx; pop rax; ret"
);
action!(out, "out {port}, al; ret", port = const PORT_OF_NOBODY);
action!(
    pause,
    "pushfq; push 100; 2: pause; dec dword ptr [rsp]; jnz 2b; lea rsp, [rsp + 8]; popfq; ret"
);
action!(spin, "pushfq; push 3000; 2: dec dword ptr [rsp]; jnz 2b; lea rsp, [rsp + 8]; popfq; ret");
action!(
    read_msr,
    "push rax; push rcx; push rdx; mov ecx, {msr}; rdmsr; pop rdx; pop rcx; pop rax; ret",
    msr = const BIOS_SIGN_ID
);
action!(
    write_msr,
    "push rax; push rcx; push rdx; mov ecx, {msr}; mov eax, 0; mov edx, 0; wrmsr; pop rdx; pop rcx; pop rax; ret",
    msr = const BIOS_SIGN_ID
);
action!(
    absent,
    "push rax; mov rax, [rip + {at}]; mov [rax], rax; mov al, [rax]; pop rax; ret",
    at = sym ABSENT_AT
);

/// Those that are allowed everywhere, then those that are at CPL 0 only.
const ACTIONS: [Action; 7] = [identify, out, pause, spin, absent, read_msr, write_msr];
const ACTIONS_ANYWHERE: u64 = 5;

// ---- one CPU ----

/// Flips the bit of that number, by a locked instruction; gives what it was.
fn flip(word: &AtomicU64, bit: u64) -> bool {
    let before: u8;
    // SAFETY: changes the word, whose number of bits `bit` is below.
    unsafe {
        asm!("lock btc [{word}], {bit}", "setc {before}", word = in(reg) word.as_ptr(),
            bit = in(reg) bit, before = out(reg_byte) before, options(nostack));
    }
    before != 0
}

/// Writes `bytes`, 4 or 8, of `value`.
fn put(at: *mut u8, value: u64, bytes: usize) {
    // SAFETY: the CPU's own memory.
    unsafe {
        match bytes {
            8 => at.cast::<u64>().write_unaligned(value),
            _ => at.cast::<u32>().write_unaligned(value as u32),
        }
    }
}

/// Reads as many.
fn get(at: *const u8, bytes: usize) -> u64 {
    // SAFETY: the CPU's own memory.
    unsafe {
        match bytes {
            8 => at.cast::<u64>().read_unaligned(),
            _ => at.cast::<u32>().read_unaligned().into(),
        }
    }
}

/// The #AC of the instruction at `rip`.
fn alignment_check(rip: u64, cpl: u8) -> Exception {
    Exception { vector: vector::ALIGNMENT_CHECK, error: 0, rip, cpl, address: 0 }
}

/// A CPU, and what it knows of the memory that is its own.
struct Worker {
    cpu: usize,
    role: Role,
    random: Random,
    round: u64,
    /// Rounds without split locks.
    calm: u64,
    /// Only such split locks as must raise #AC.
    held: bool,
    /// Whether it can turn detection on.
    offered: bool,
    /// Whether it has.
    detects: bool,
    counter: u64,
    lane: u64,
    split_lane: u64,
    sum: u64,
    value: u64,
}

impl Worker {
    fn new(cpu: usize) -> Self {
        let Settings { role, seed, calm, held, .. } = &SETTINGS;
        let (_, role) = Role::ALL[role.load(Ordering::Relaxed)];
        Self {
            cpu,
            role,
            random: Random::new(seed.load(Ordering::Relaxed), cpu as u64),
            round: 0,
            calm: calm.load(Ordering::Relaxed),
            held: held.load(Ordering::Relaxed),
            offered: role == Role::Aware && cpu::offers_split_lock_detection() == Ok(true),
            detects: false,
            counter: 0,
            lane: 0,
            split_lane: 0,
            sum: 0,
            value: 0,
        }
    }

    fn step(&mut self) -> Result<(), Failure> {
        self.locked()?;
        self.registers()?;
        match self.random.below(8) {
            0 => self.test_ctrl()?,
            1 => self.ports()?,
            2 => self.wake_others(),
            3 => self.absent()?,
            _ => (),
        }
        if self.role != Role::Calm && self.round >= self.calm {
            self.split()?;
        }
        // Interrupts come in here, and while registers are carried.
        enable_interrupts();
        for _ in 0..self.random.below(500) {
            hint::black_box(());
        }
        disable_interrupts();
        if cpus() > 2 && self.cpu == cpus() - 1 && self.random.one_in(8) {
            self.sleep()?;
        }
        Ok(())
    }

    /// Locked instructions that are not split.
    fn locked(&mut self) -> Result<(), Failure> {
        for _ in 0..self.random.below(16) {
            let counter = SHARED.counter.fetch_add(1, Ordering::Relaxed);
            XADD.unless(counter >= self.counter)?;
            self.counter = counter + 1;
            let bit = 4 * self.cpu as u64 + self.random.below(4);
            LANE.unless(flip(&SHARED.lanes, bit) == (self.lane >> bit & 1 != 0))?;
            self.lane ^= 1 << bit;

            let own = &OWNS[self.cpu];
            let add = self.random.next();
            OWN.unless(own.sum.fetch_add(add, Ordering::Relaxed) == self.sum)?;
            self.sum = self.sum.wrapping_add(add);
            let value = self.random.next();
            let (wrong, right) = (self.value ^ 1, self.value);
            let exchange = |expected| {
                own.value.compare_exchange(expected, value, Ordering::Relaxed, Ordering::Relaxed)
            };
            OWN.unless(exchange(wrong) == Err(right) && exchange(right) == Ok(right))?;
            self.value = value;
        }
        Ok(())
    }

    /// All registers, across something that leaves the guest or takes its time.
    fn registers(&mut self) -> Result<(), Failure> {
        let random = &mut self.random;
        let mut wanted = Registers::ZERO;
        for register in &mut wanted.xmm {
            *register = u128::from(random.next()) << 64 | u128::from(random.next());
        }
        for register in &mut wanted.general {
            *register = random.next();
        }
        wanted.rflags = random.next() & Registers::FLAGS;
        let mut found = Registers::ZERO;
        let ring3 = random.one_in(4);
        let actions = if ring3 { ACTIONS_ANYWHERE } else { ACTIONS.len() as u64 };
        let action = ACTIONS[random.below(actions) as usize];
        // SAFETY: the action leaves all registers alone.
        let mut run = || unsafe { carry(&raw const wanted, &raw mut found, action) };
        if ring3 {
            in_ring(Ring::Three, run);
        } else {
            enable_interrupts();
            run();
            disable_interrupts();
        }
        found.rflags &= Registers::FLAGS;
        REGISTERS.unless(found == wanted)
    }

    /// The guest's MSR 0x33. Which CPU has it, exposed or not, does not matter: it holds what was
    /// written.
    fn test_ctrl(&mut self) -> Result<(), Failure> {
        let value = if self.detects { SPLIT_LOCK_DETECT } else { 0 };
        TEST_CTRL_VALUE.unless(rdmsr(TEST_CTRL) == Ok(value))?;
        if self.offered {
            self.detects = self.random.one_in(2);
            let value = if self.detects { SPLIT_LOCK_DETECT } else { 0 };
            // SAFETY: from here on split locks are of the other kind.
            TEST_CTRL_VALUE.unless(unsafe { wrmsr(TEST_CTRL, value) }.is_ok())?;
            TEST_CTRL_VALUE.unless(rdmsr(TEST_CTRL) == Ok(value))?;
        }
        Ok(())
    }

    fn ports(&mut self) -> Result<(), Failure> {
        // SAFETY: nothing is there.
        let read = unsafe {
            cpu::out32(PORT_OF_NOBODY, self.random.next() as u32);
            cpu::in32(PORT_OF_NOBODY)
        };
        cpuid(1);
        PORT.unless(read == u32::MAX)
    }

    /// An interrupt for another CPU, now and then an NMI.
    fn wake_others(&mut self) {
        if cpus() == 1 {
            return;
        }
        let last = cpus() - 1;
        let target = self.random.below(cpus() as u64) as usize;
        let target = if self.random.one_in(2) { last } else { target };
        if target == self.cpu {
            return;
        }
        let nmi = self.random.one_in(8);
        send(To::Cpu(target), if nmi { Ipi::Nmi } else { Ipi::Fixed(WAKE) });
    }

    /// Halts until the next interrupt.
    fn sleep(&mut self) -> Result<(), Failure> {
        let before = arrived(self.cpu, WAKE);
        // An NMI ends HLT too.
        let all = || arrived(self.cpu, WAKE) + arrived(self.cpu, vector::NMI);
        while arrived(self.cpu, WAKE) == before {
            let before = all();
            halt();
            WOKEN.unless(all() != before)?;
        }
        Ok(())
    }

    fn absent(&mut self) -> Result<(), Failure> {
        let at = ABSENT_AT.load(Ordering::Relaxed) + 8 * self.random.below(512);
        let value = self.random.next();
        // SAFETY: mapped, and no memory of the guest is there.
        let read = unsafe {
            (at as *mut u64).write_volatile(value);
            (at as *const u64).read_volatile()
        };
        ABSENT.unless(read == u64::MAX)
    }

    /// Some split locks, at any CPL.
    fn split(&mut self) -> Result<(), Failure> {
        for _ in 0..self.random.below(4) {
            let ring3 = self.random.one_in(2);
            if self.role == Role::Legacy && self.random.one_in(2) {
                self.legacy()?;
                continue;
            }
            let detected = self.detects;
            if self.held && !detected {
                continue;
            }
            let operation = match self.random.below(6) {
                0 | 1 => Operation::Add,
                2 => Operation::Xchg,
                3 => Operation::Xadd,
                4 => Operation::Code32,
                // There is no such segment for ring 3.
                _ if ring3 => Operation::Code32,
                _ => Operation::Code16,
            };
            // At CPL 0 alignment checking does not count.
            let unchecked = self.role == Role::Legacy && !ring3;
            let rflags = if unchecked { EFLAGS_AC | 2 } else { 2 };
            self.split_one(operation, detected, ring3, rflags)?;
            if !detected && self.random.one_in(4) {
                let bit = 4 * self.cpu as u64 + self.random.below(4);
                let mut register = bit;
                let run = split_allowed_flip(split_lanes(), &mut register, 2);
                EXCEPTION.unless(run.caught.is_none())?;
                LANE.unless(register & 0xFF == self.split_lane >> bit & 1)?;
                self.split_lane ^= 1 << bit;
            }
        }
        Ok(())
    }

    /// Legacy alignment checking: CPL 3 and EFLAGS.AC, CR0.AM is on.
    fn legacy(&mut self) -> Result<(), Failure> {
        if self.random.one_in(2) {
            return self.split_one(Operation::Legacy, true, true, EFLAGS_AC | 2);
        }
        let operand = ARENAS[self.cpu].0.get().cast::<u8>().wrapping_add(1);
        let Run { at, caught, .. } = in_ring(Ring::Three, || misaligned(operand));
        MISALIGNED.unless(caught.is_some())?;
        WRONG_EXCEPTION.unless(caught == Some(alignment_check(at, 3)))?;
        // And none at CPL 0.
        let run = misaligned(operand);
        EXCEPTION.unless(run.caught.is_none())
    }

    fn split_one(
        &mut self,
        operation: Operation,
        detected: bool,
        ring3: bool,
        rflags: u64,
    ) -> Result<(), Failure> {
        let bytes = operation.bytes();
        // Across two cache lines, now and then two pages.
        let random = &mut self.random;
        let line = if random.one_in(8) { 64 } else { 1 + random.below(120) };
        let operand = 64 * line as usize - 1 - random.below(bytes as u64 - 1) as usize;
        let operand = ARENAS[self.cpu].0.get().cast::<u8>().wrapping_add(operand);
        let mask = if bytes == 8 { u64::MAX } else { 0xFFFF_FFFF };
        let (memory, before) = (random.next() & mask, random.next() & mask);
        put(operand, memory, bytes);

        let mut register = before;
        let run = if ring3 {
            let register = &mut register;
            in_ring(Ring::Three, move || operation.execute(detected, operand, register, rflags))
        } else {
            operation.execute(detected, operand, &mut register, rflags)
        };
        let found = (get(operand, bytes), register);
        let cpl = if ring3 { 3 } else { 0 };
        let due = detected.then(|| alignment_check(run.at, cpl));
        if run.caught != due {
            let is_ac = |exception: Exception| exception.vector == vector::ALIGNMENT_CHECK;
            let failure = match run.caught {
                None => NO_EXCEPTION,
                Some(exception) if !detected && is_ac(exception) => EXCEPTION,
                Some(exception) => {
                    println!("{exception}, at {:#x}", run.at);
                    WRONG_EXCEPTION
                }
            };
            return Err(failure);
        }
        if detected {
            HAPPENED.unless(found == (memory, before))
        } else {
            VALUE.unless(found == operation.result(memory, before))
        }
    }
}

/// Ends the guest.
fn fail(failure: &Failure, round: u64) -> ! {
    println!("stress: FAILED {} cpu={} round={round}", failure.what, this_cpu());
    exit::exit(failure.code)
}

/// What each CPU runs; returns when all have done their rounds, if there is a number of them.
extern "C" fn run(cpu: usize) {
    smp::enable_apic();
    // Who sends NMIs before all have left real mode, where they have no handler, ends the guest.
    if let Err(stuck) = smp::meet() {
        fail(&stuck, 0);
    }
    let mut worker = Worker::new(cpu);
    if worker.role == Role::Legacy {
        // SAFETY: AM counts only where EFLAGS.AC is set.
        unsafe { cpu::set_cr0(cpu::cr0() | CR0_AM) };
    }
    let rounds = SETTINGS.rounds.load(Ordering::Relaxed);
    while rounds == 0 || worker.round < rounds {
        if let Err(failure) = worker.step() {
            fail(&failure, worker.round);
        }
        worker.round += 1;
    }
    FINISHED.fetch_add(1, Ordering::AcqRel);
    // The last one may halt.
    while FINISHED.load(Ordering::Acquire) < cpus() as u64 {
        if cpu != cpus() - 1 {
            send(To::Cpu(cpus() - 1), Ipi::Fixed(WAKE));
        }
        smp::wait_for(10_000, || false);
    }
}

fn main(boot: &Boot) -> Result<(), Failure> {
    let role = boot.value("role").unwrap_or("calm");
    let seed = boot.number("seed").unwrap_or(1);
    println!("stress: role={role} vcpus={} seed={seed}", cpus());
    let Some(role) = Role::ALL.iter().position(|(name, _)| *name == role) else {
        fail(&ROLE, 0);
    };
    if boot.number("vcpus").is_some_and(|vcpus| vcpus != cpus() as u64) {
        fail(&CPUS, 0);
    }
    SETTINGS.role.store(role, Ordering::Relaxed);
    SETTINGS.seed.store(seed, Ordering::Relaxed);
    SETTINGS.calm.store(boot.number("calm").unwrap_or(0), Ordering::Relaxed);
    SETTINGS.held.store(boot.has("held"), Ordering::Relaxed);
    SETTINGS.rounds.store(boot.number("rounds").unwrap_or(0), Ordering::Relaxed);
    let absent = boot.memory_end.next_multiple_of(4096).max(0x4000_0000);
    ABSENT_AT.store(absent, Ordering::Relaxed);
    if start_others(run).is_err() {
        fail(&CPUS, 0);
    }
    run(0);
    Ok(())
}
