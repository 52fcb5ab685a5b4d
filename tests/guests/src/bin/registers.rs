//! Fills every register that has to survive VM exits and the turns of other VMs with a pattern, then
//! leaves the guest in every way that it can, and compares all of them after each. Before that: how
//! XSAVE is enumerated, and which values XCR0 takes.
//!
//! Command line: `seed=N`, what the patterns are made of; `rounds=N`.
//!
//! Exit codes: success; 0x30 to 0x3A, see the constants.

#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};
use core::sync::atomic::{AtomicU64, Ordering};

use guests::cpu::{self, CR0_AM, EFLAGS_AC, cpuid, cpuid_count, rdmsr, wrmsr};
use guests::exit::Failure;
use guests::trap::{Exception, Run, vector, with_handler};
use guests::{Boot, guest, println, probe, segments};

guest!(main);

const OSXSAVE: Failure = Failure::new(0x30, "CPUID does not show CR4.OSXSAVE as it is");
const SIZES: Failure = Failure::new(0x31, "the sizes and offsets of CPUID leaf 0xD do not add up");
const XCR0_TAKEN: Failure = Failure::new(0x32, "XSETBV of a bad value gave no #GP(0)");
const XCR0_REFUSED: Failure = Failure::new(0x33, "XSETBV of a good value had no effect");
const GENERAL: Failure = Failure::new(0x34, "a general register or RFLAGS changed");
const EXTENDED: Failure = Failure::new(0x35, "x87, SSE or other extended state changed");
const MODEL_SPECIFIC: Failure = Failure::new(0x36, "an MSR changed");
const DEBUG: Failure = Failure::new(0x37, "a debug register changed");
const CONTROL: Failure = Failure::new(0x38, "CR2 or XCR0 changed");
const EVENTS_DIFFER: Failure = Failure::new(0x39, "not the exceptions that were due");
const NO_XSAVE: Failure = Failure::new(0x3A, "XCR0 is wider than this guest knows");

/// Rounds if the command line names no number.
const ROUNDS: u64 = 4;
/// Iterations of a loop that is long enough to be interrupted.
const SPIN: u64 = 30_000;

/// XCR0: x87, SSE, AVX, the three components of AVX-512 (SDM volume 1, "XSAVE-Supported Features
/// and State-Component Bitmaps").
const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const AVX512: u64 = 7 << 5;
const KNOWN: u64 = X87 | SSE | AVX | AVX512;

const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_MCE_BIT: u64 = 6;
const CR0_CD_BIT: u64 = 30;
const RFLAGS_TF: u64 = 1 << 8;
/// CF, PF, AF, ZF, SF, DF, OF, ID.
const FLAGS: u64 = 0x20_0CD5;
const DR6_ONES: u64 = 0xFFFF_0FF0;
/// DR6: B0 to B3, BD, BS, BT.
const DR6_CAUSES: u64 = 0xE00F;
const DR6_BS: u64 = 1 << 14;

/// The hypervisor answers it: IA32_BIOS_SIGN_ID.
const MSR_OK: u32 = 0x8B;
/// There is none of this number.
const MSR_NONE: u32 = 0x4FFF_FFFF;
/// Far beyond the guest's memory, and mapped.
const HOLE: u32 = 0x4000_0000;
/// Bytes of [`Registers::extended`].
const AREA: usize = 4096;
/// Legacy region and header.
const LEGACY: u32 = 576;

/// The registers that one instruction stream can load and store.
#[repr(C, align(64))]
struct Registers {
    /// An XSAVE area in the standard format, or an FXSAVE area.
    extended: [u64; AREA / 8],
    /// In the order of instruction encoding. RSP is filled in on the way.
    general: [u64; 16],
    flags: u64,
}

impl Registers {
    const ZERO: Self = Self { extended: [0; AREA / 8], general: [0; 16], flags: 0 };
}

const GENERAL_AT: usize = core::mem::offset_of!(Registers, general);
const FLAGS_AT: usize = core::mem::offset_of!(Registers, flags);

/// XCR0 with all that there is; 0 without XSAVE.
static MASK: AtomicU64 = AtomicU64::new(0);
/// What [`run`] keeps while every register has its pattern.
static ACTION: AtomicU64 = AtomicU64::new(0);
static FOUND: AtomicU64 = AtomicU64::new(0);
static HOME: AtomicU64 = AtomicU64::new(0);
/// RSP of ring 0 while ring 3 runs.
static RING0: AtomicU64 = AtomicU64::new(0);
/// A loop counter in memory.
static LEFT: AtomicU64 = AtomicU64::new(0);
/// Where a single step has to end.
static STEP_END: AtomicU64 = AtomicU64::new(0);
/// Exceptions that the handlers below took, one byte each: #GP, #UD, #AC, #DB, #DB elsewhere.
static EVENTS: AtomicU64 = AtomicU64::new(0);
const GP: u64 = 1;
const UD: u64 = 1 << 8;
const AC: u64 = 1 << 16;
const DB: u64 = 1 << 24;
const DB_ELSEWHERE: u64 = 1 << 32;

/// Loads all registers from `wanted`, calls `action`, stores all registers to `found`.
#[unsafe(naked)]
unsafe extern "C" fn run(
    action: unsafe extern "C" fn(),
    wanted: *mut Registers,
    found: *mut Registers,
) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rip + {action}], rdi",
        "mov [rip + {found}], rdx",
        "mov eax, [rip + {mask}]",
        "mov edx, [rip + {mask} + 4]",
        "test eax, eax",
        "jz 2f",
        "xrstor64 [rsi]",
        "jmp 3f",
        "2: fxrstor64 [rsi]",
        "3: mov [rip + {home}], rsp",
        "mov [rsi + {general} + 4 * 8], rsp",
        "push qword ptr [rsi + {flags}]",
        "popfq",
        "mov rax, [rsi + {general}]", "mov rcx, [rsi + {general} + 8]",
        "mov rdx, [rsi + {general} + 16]", "mov rbx, [rsi + {general} + 24]",
        "mov rbp, [rsi + {general} + 40]", "mov rdi, [rsi + {general} + 56]",
        "mov r8, [rsi + {general} + 64]", "mov r9, [rsi + {general} + 72]",
        "mov r10, [rsi + {general} + 80]", "mov r11, [rsi + {general} + 88]",
        "mov r12, [rsi + {general} + 96]", "mov r13, [rsi + {general} + 104]",
        "mov r14, [rsi + {general} + 112]", "mov r15, [rsi + {general} + 120]",
        "mov rsi, [rsi + {general} + 48]",
        "call [rip + {action}]",
        "pushfq",
        "push rax",
        "mov rax, [rip + {found}]",
        "mov [rax + {general} + 8], rcx",
        "mov [rax + {general} + 16], rdx", "mov [rax + {general} + 24], rbx",
        "mov [rax + {general} + 40], rbp", "mov [rax + {general} + 48], rsi",
        "mov [rax + {general} + 56], rdi", "mov [rax + {general} + 64], r8",
        "mov [rax + {general} + 72], r9", "mov [rax + {general} + 80], r10",
        "mov [rax + {general} + 88], r11", "mov [rax + {general} + 96], r12",
        "mov [rax + {general} + 104], r13", "mov [rax + {general} + 112], r14",
        "mov [rax + {general} + 120], r15",
        "pop qword ptr [rax + {general}]",
        "pop qword ptr [rax + {flags}]",
        "mov [rax + {general} + 4 * 8], rsp",
        "mov rsp, [rip + {home}]",
        "cld",
        "mov rdi, rax",
        "mov eax, [rip + {mask}]",
        "mov edx, [rip + {mask} + 4]",
        "test eax, eax",
        "jz 2f",
        "xsave64 [rdi]",
        "jmp 3f",
        "2: fxsave64 [rdi]",
        // As compiled code wants them.
        "3: fninit",
        "push 0x1F80",
        "ldmxcsr [rsp]",
        "pop rax",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        action = sym ACTION,
        found = sym FOUND,
        mask = sym MASK,
        home = sym HOME,
        general = const GENERAL_AT,
        flags = const FLAGS_AT,
    )
}

/// Ways to leave the guest that leave all registers, RFLAGS included, as they are.
macro_rules! action {
    ($name:ident, $code:literal $(, $operand:ident = $kind:tt $value:expr)* $(,)?) => {
        #[unsafe(naked)]
        unsafe extern "C" fn $name() {
            naked_asm!($code, $($operand = $kind $value),*)
        }
    };
}

action!(nothing, "ret");
action!(
    cpuid_all,
    r#"
    push rax; push rbx; push rcx; push rdx; mov eax, 0; mov ecx, 0; cpuid; mov eax, 1
    cpuid; mov eax, 0xD; mov ecx, 2; cpuid; mov eax, 0x40000000; cpuid; pop rdx; pop rcx
    pop rbx; pop rax; ret
    "#
);
action!(
    msr_ok,
    r#"
    push rax; push rcx; push rdx; mov ecx, {msr}; rdmsr; mov eax, 0; mov edx, 0; wrmsr
    pop rdx; pop rcx; pop rax; ret
    "#,
    msr = const MSR_OK
);
action!(
    msr_gp,
    "push rcx; mov ecx, {msr}; rdmsr; wrmsr; pop rcx; ret",
    msr = const MSR_NONE
);
action!(rdpmc_gp, "rdpmc; ret");
action!(vmcall_ud, "vmcall; ret");
// A port that nobody owns, the scratch register of the UART, and IN of each width.
action!(
    ports,
    r#"
    out 0x80, al; out 0x80, ax; out 0x80, eax; push rax; push rdx; mov edx, 0x3FF
    out dx, al; in al, dx; in al, 0xE0; in ax, 0xE0; in eax, 0xE0; pop rdx; pop rax; ret
    "#
);
action!(
    hole,
    r#"
    mov [{at}], rax; movups [{at} + 0xFF8], xmm7; push rax; mov al, [{at}]
    mov rax, [{at} + 0x1000]; pop rax; ret
    "#,
    at = const HOLE
);
action!(
    cr0_cd,
    r#"
    pushfq; push rax; mov rax, cr0; btc rax, {cd}; mov cr0, rax; btc rax, {cd}
    mov cr0, rax; pop rax; popfq; ret
    "#,
    cd = const CR0_CD_BIT
);
action!(
    cr4_mce,
    r#"
    pushfq; push rax; mov rax, cr4; btc rax, {mce}; mov cr4, rax; btc rax, {mce}
    mov cr4, rax; pop rax; popfq; ret
    "#,
    mce = const CR4_MCE_BIT
);
action!(cr8, "push rax; mov rax, cr8; mov cr8, rax; pop rax; ret");
action!(wbinvd, "wbinvd; ret");
action!(invd, "invd; ret");
action!(
    xcr0_same,
    r#"
    push rax; push rcx; push rdx; mov ecx, 0; mov eax, [rip + {mask}]
    mov edx, [rip + {mask} + 4]; xsetbv; pop rdx; pop rcx; pop rax; ret
    "#,
    mask = sym MASK
);
action!(
    spin,
    r#"
    pushfq; mov qword ptr [rip + {left}], {spin}
    2: dec qword ptr [rip + {left}]; jnz 2b; popfq; ret
    "#,
    left = sym LEFT,
    spin = const SPIN
);
// What XCR0 leaves out for a while, and CR4.OSXSAVE does, is still there afterwards.
action!(
    spin_without_xsave,
    r#"
    pushfq; push rax; push rcx; push rdx; mov ecx, 0; mov eax, 1; mov edx, 0; xsetbv
    mov rax, cr4; and rax, ~{osxsave}; mov cr4, rax
    mov qword ptr [rip + {left}], {spin}
    2: dec qword ptr [rip + {left}]; jnz 2b; or rax, {osxsave}; mov cr4, rax
    mov eax, [rip + {mask}]; mov edx, [rip + {mask} + 4]; xsetbv; pop rdx; pop rcx
    pop rax; popfq; ret
    "#,
    left = sym LEFT,
    spin = const SPIN,
    mask = sym MASK,
    osxsave = const CR4_OSXSAVE
);
action!(
    pause,
    r#"
    pushfq; mov qword ptr [rip + {left}], 5000
    2: pause; dec qword ptr [rip + {left}]; jnz 2b; popfq; ret
    "#,
    left = sym LEFT
);
// One instruction that does not leave the guest by itself, and one that the hypervisor does.
action!(
    step,
    r#"
    lea rsp, [rsp - 8]; mov [rsp], rax; lea rax, [rip + 2f]; mov [rip + {end}], rax
    mov rax, [rsp]; lea rsp, [rsp + 8]; pushfq; or qword ptr [rsp], {tf}; popfq; nop
    2: ret
    "#,
    end = sym STEP_END,
    tf = const RFLAGS_TF
);
action!(
    step_cpuid,
    r#"
    push rax; push rbx; push rcx; push rdx; lea rax, [rip + 2f]; mov [rip + {end}], rax
    mov eax, 0; pushfq; or qword ptr [rsp], {tf}; popfq; cpuid
    2: pop rdx; pop rcx; pop rbx; pop rax; ret
    "#,
    end = sym STEP_END,
    tf = const RFLAGS_TF
);
action!(misaligned, "mov [rip + {left} + 1], eax; ud2", left = sym LEFT);
// A misaligned access at CPL 3; the handler of #AC comes back to ring 0.
action!(
    alignment,
    r#"
    mov [rip + {ring0}], rsp; push {ss}; push [rip + {ring0}]; pushfq
    or qword ptr [rsp], {ac}; push {cs}; push offset {ring3}; iretq
    "#,
    ring0 = sym RING0,
    ring3 = sym misaligned,
    ss = const segments::data(3),
    cs = const segments::code(3),
    ac = const EFLAGS_AC
);

// The instructions are 2 and 3 bytes long.
action!(
    on_gp,
    "add rsp, 8; add qword ptr [rsp], 2; add qword ptr [rip + {events}], {gp}; iretq",
    events = sym EVENTS,
    gp = const GP
);
action!(
    on_ud,
    "add qword ptr [rsp], 3; add qword ptr [rip + {events}], {ud}; iretq",
    events = sym EVENTS,
    ud = const UD
);
action!(
    on_ac,
    r#"
    add rsp, 8; add qword ptr [rip + {events}], {count}
    mov qword ptr [rsp], offset {back}; mov qword ptr [rsp + 8], {cs}
    and qword ptr [rsp + 16], ~{ac}; push [rip + {ring0}]; pop [rsp + 24]
    mov qword ptr [rsp + 32], {ss}; iretq
    "#,
    events = sym EVENTS,
    count = const AC,
    back = sym nothing,
    ring0 = sym RING0,
    cs = const segments::code(0),
    ss = const segments::data(0),
    ac = const EFLAGS_AC
);
action!(
    on_db,
    r#"
    push rax; mov rax, [rsp + 8]; cmp rax, [rip + {end}]; mov eax, {db}; je 2f
    mov rax, {elsewhere}
    2: add [rip + {events}], rax; pop rax; and qword ptr [rsp + 16], ~{tf}; iretq
    "#,
    events = sym EVENTS,
    end = sym STEP_END,
    db = const DB,
    elsewhere = const DB_ELSEWHERE,
    tf = const RFLAGS_TF
);

/// A way to leave the guest.
struct Action {
    name: &'static str,
    code: unsafe extern "C" fn(),
    /// What it adds to [`EVENTS`].
    events: u64,
    /// Whether it needs XSAVE.
    xsave: bool,
}

const fn action(name: &'static str, code: unsafe extern "C" fn(), events: u64) -> Action {
    Action { name, code, events, xsave: false }
}

const ACTIONS: [Action; 20] = [
    action("nothing", nothing, 0),
    action("CPUID", cpuid_all, 0),
    action("RDMSR and WRMSR", msr_ok, 0),
    action("RDMSR and WRMSR with #GP", msr_gp, 2 * GP),
    action("RDPMC with #GP", rdpmc_gp, GP),
    action("VMCALL with #UD", vmcall_ud, UD),
    action("ports", ports, 0),
    action("memory that is not there", hole, 0),
    action("CR0.CD", cr0_cd, 0),
    action("CR4.MCE", cr4_mce, 0),
    action("CR8", cr8, 0),
    action("WBINVD", wbinvd, 0),
    action("INVD", invd, 0),
    Action { xsave: true, ..action("XSETBV", xcr0_same, 0) },
    action("#AC", alignment, AC),
    action("single step", step, DB),
    action("single step over CPUID", step_cpuid, DB),
    action("time", spin, 0),
    Action { xsave: true, ..action("time with XSAVE off", spin_without_xsave, 0) },
    action("PAUSE", pause, 0),
];

/// Patterns: SplitMix64.
struct Patterns(u64);

impl Patterns {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// An address that any number of paging levels takes.
    fn canonical(&mut self) -> u64 {
        ((self.next() << 17) as i64 >> 17) as u64
    }
}

/// Registers that keep their pattern for a whole round.
struct Kept {
    /// Number and value.
    msrs: [(u32, u64); 11],
    dr: [u64; 4],
    cr2: u64,
}

impl Kept {
    fn new(patterns: &mut Patterns) -> Self {
        let rdtscp = cpuid(0x8000_0001).edx & 1 << 27 != 0;
        let eflags_mask = patterns.next() & 0xFFFF_FFFF;
        Self {
            msrs: [
                // SYSENTER_CS, _ESP, _EIP.
                (0x174, patterns.next() & 0xFFFF),
                (0x175, patterns.canonical()),
                (0x176, patterns.canonical()),
                // STAR, LSTAR, CSTAR, FMASK.
                (0xC000_0081, patterns.next()),
                (0xC000_0082, patterns.canonical()),
                (0xC000_0083, patterns.canonical()),
                (0xC000_0084, eflags_mask),
                // FS base, GS base, KERNEL_GS_BASE.
                (0xC000_0100, patterns.canonical()),
                (0xC000_0101, patterns.canonical()),
                (0xC000_0102, patterns.canonical()),
                // TSC_AUX, or one more time FMASK where it is not there.
                if rdtscp {
                    (0xC000_0103, patterns.next() & 0xFFFF_FFFF)
                } else {
                    (0xC000_0084, eflags_mask)
                },
            ],
            dr: [patterns.next(), patterns.next(), patterns.next(), patterns.next()],
            cr2: patterns.next(),
        }
    }

    fn load(&self) -> Result<(), Failure> {
        for (number, value) in self.msrs {
            // SAFETY: nothing here uses SYSCALL, SYSENTER, SWAPGS, FS or GS.
            let written = unsafe { wrmsr(number, value) };
            MODEL_SPECIFIC.unless(written.is_ok())?;
        }
        let [dr0, dr1, dr2, dr3] = self.dr;
        // SAFETY: no breakpoint is enabled; no page fault is being handled.
        unsafe {
            asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}", "mov cr2, {}",
                in(reg) dr0, in(reg) dr1, in(reg) dr2, in(reg) dr3, in(reg) self.cr2,
                options(nomem, nostack, preserves_flags));
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Failure> {
        for (number, value) in self.msrs {
            let found = rdmsr(number);
            if found != Ok(value) {
                println!("MSR {number:#x}: {value:#x} became {found:x?}");
                return Err(MODEL_SPECIFIC);
            }
        }
        let (dr0, dr1, dr2, dr3): (u64, u64, u64, u64);
        // SAFETY: reads at CPL 0.
        unsafe {
            asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3",
                out(reg) dr0, out(reg) dr1, out(reg) dr2, out(reg) dr3,
                options(nomem, nostack, preserves_flags));
        }
        let dr = [dr0, dr1, dr2, dr3];
        if dr != self.dr {
            println!("DR0 to DR3: {:x?} became {dr:x?}", self.dr);
            return Err(DEBUG);
        }
        CONTROL.unless(cpu::cr2() == self.cr2)
    }
}

fn set_dr6(value: u64) {
    // SAFETY: it only reports.
    unsafe { asm!("mov dr6, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
}

fn dr6() -> u64 {
    let value;
    // SAFETY: a read at CPL 0.
    unsafe { asm!("mov {}, dr6", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Where the components of `MASK` beyond the legacy region are: bytes from, bytes to.
fn components(mask: u64) -> impl Iterator<Item = (u32, u32)> + Clone {
    (2..63).filter(move |index| mask & 1 << index != 0).map(|index| {
        let leaf = cpuid_count(0xD, index);
        (leaf.ebx, leaf.ebx + leaf.eax)
    })
}

/// Fills `registers` so that they can be loaded.
fn fill(registers: &mut Registers, patterns: &mut Patterns, mask: u64) {
    registers.general.fill_with(|| patterns.next());
    registers.flags = patterns.next() & FLAGS | 2;
    let area = &mut registers.extended;
    // FCW: all exceptions masked. FSW: no summary bit, as nothing is unmasked. FTW: any. FOP: 11
    // bits.
    let x87 = patterns.next();
    area[0] = x87 & 0x0C00 | 0x037F | x87 & 0x7F7F_0000 | x87 & 0x07FF_00FF_0000_0000;
    // Where the last instruction and its operand were.
    area[1] = patterns.canonical();
    area[2] = patterns.canonical();
    // MXCSR: all exceptions masked; rounding, flags, denormals and flush to zero any.
    area[3] = patterns.next() & 0xE07F | 0x1F80;
    for index in 0..8 {
        area[4 + 2 * index] = patterns.next();
        area[5 + 2 * index] = patterns.next() & 0xFFFF;
    }
    area[20..52].fill_with(|| patterns.next());
    // The header: everything is there, nothing is compacted.
    area[52..].fill(0);
    area[64] = mask;
    for (from, to) in components(mask) {
        area[from as usize / 8..to as usize / 8].fill_with(|| patterns.next());
    }
}

/// Which words of the extended state are registers; word 3 is half of one.
fn is_state(word: usize, mask: u64) -> bool {
    let byte = 8 * word as u32;
    word < 52 || word == 64 || components(mask).any(|(from, to)| (from..to).contains(&byte))
}

fn compare(wanted: &Registers, found: &Registers, mask: u64) -> Result<(), Failure> {
    for (index, (wanted, found)) in wanted.general.iter().zip(&found.general).enumerate() {
        if wanted != found {
            println!("general register {index}: {wanted:#x} became {found:#x}");
            return Err(GENERAL);
        }
    }
    if wanted.flags != found.flags & (FLAGS | 2) {
        println!("RFLAGS: {:#x} became {:#x}", wanted.flags, found.flags);
        return Err(GENERAL);
    }
    for (word, (wanted, found)) in wanted.extended.iter().zip(&found.extended).enumerate() {
        // The upper half of MXCSR's word is a mask that is the processor's to say.
        let found = if word == 3 { found & 0xFFFF_FFFF } else { *found };
        if *wanted != found && is_state(word, mask) {
            println!("extended state at {:#x}: {wanted:#x} became {found:#x}", 8 * word);
            return Err(EXTENDED);
        }
    }
    Ok(())
}

fn main(boot: &Boot) -> Result<(), Failure> {
    let seed = boot.number("seed").unwrap_or(1);
    let rounds = boot.number("rounds").unwrap_or(ROUNDS);
    let mask = if cpuid(1).ecx & 1 << 26 != 0 { enable_xsave()? } else { 0 };
    MASK.store(mask, Ordering::Relaxed);
    println!("registers across exits: seed {seed}, {rounds} rounds, XCR0 {mask:#x}");

    // SAFETY: AM counts only where EFLAGS.AC is set.
    unsafe { cpu::set_cr0(cpu::cr0() | CR0_AM) };
    let mut patterns = Patterns(seed);
    for _ in 0..rounds {
        Kept::new(&mut patterns).round(&mut patterns, mask)?;
    }
    Ok(())
}

impl Kept {
    fn round(&self, patterns: &mut Patterns, mask: u64) -> Result<(), Failure> {
        let mut wanted = Registers::ZERO;
        self.load()?;
        for action in ACTIONS.iter().filter(|action| mask != 0 || !action.xsave) {
            fill(&mut wanted, patterns, mask);
            let mut found = Registers::ZERO;
            let causes = patterns.next() & DR6_CAUSES | DR6_ONES;
            set_dr6(causes);
            EVENTS.store(0, Ordering::Relaxed);
            // SAFETY: (1) the actions keep every register and touch nothing but the statics above,
            // ports that nobody minds and memory that is not there; (2) the handlers do what the
            // gates ask of them; (3) the areas are aligned and as large as `mask` needs.
            unsafe {
                with_handler(vector::GENERAL_PROTECTION, on_gp, || {
                    with_handler(vector::INVALID_OPCODE, on_ud, || {
                        with_handler(vector::ALIGNMENT_CHECK, on_ac, || {
                            with_handler(vector::DEBUG, on_db, || {
                                run(action.code, &raw mut wanted, &raw mut found);
                            });
                        });
                    });
                });
            }
            let result = self.verify(action, causes, &wanted, &found, mask);
            if result.is_err() {
                println!("after: {}", action.name);
            }
            result?;
        }
        Ok(())
    }

    fn verify(
        &self,
        action: &Action,
        causes: u64,
        wanted: &Registers,
        found: &Registers,
        mask: u64,
    ) -> Result<(), Failure> {
        let events = EVENTS.load(Ordering::Relaxed);
        if events != action.events {
            println!("exceptions: {events:#x}, due: {:#x}", action.events);
            return Err(EVENTS_DIFFER);
        }
        let debug = dr6();
        let right = if events == DB { debug & DR6_BS != 0 } else { debug == causes };
        if !right {
            println!("DR6: {causes:#x} became {debug:#x}");
            return Err(DEBUG);
        }
        compare(wanted, found, mask)?;
        self.check()?;
        CONTROL.unless(mask == 0 || xgetbv() == mask)
    }
}

fn xsetbv(register: u32, value: u64) -> Run {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: nothing but `run` uses more than SSE state, and there XCR0 has everything.
    unsafe { probe!(2, ["xsetbv"], in("ecx") register, in("eax") low, in("edx") high) }
}

fn xgetbv() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: only reads; CR4.OSXSAVE is set.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
            options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

fn set_osxsave(on: bool) {
    let bit = if on { CR4_OSXSAVE } else { 0 };
    // SAFETY: only allows instructions that nothing uses while it is off.
    unsafe {
        asm!("mov {cr4}, cr4", "and {cr4}, ~{osxsave}", "or {cr4}, {bit}", "mov cr4, {cr4}",
            cr4 = out(reg) _, bit = in(reg) bit, osxsave = const CR4_OSXSAVE, options(nostack));
    }
}

/// Whether XCR0 may have this value where it can have all of `mask` (SDM volume 1, "Enabling the
/// XSAVE Feature Set and XSAVE-Enabled Features").
fn is_allowed(value: u64, mask: u64) -> bool {
    let avx512 = value & AVX512;
    value & !mask == 0
        && value & X87 != 0
        && (value & AVX == 0 || value & SSE != 0)
        && (avx512 == 0 || avx512 == AVX512 && value & AVX != 0)
}

/// Checks how XSAVE is enumerated and switched on, and sets XCR0 to all that there is, which it
/// returns.
fn enable_xsave() -> Result<u64, Failure> {
    let shown = || cpuid(1).ecx & 1 << 27 != 0;
    for on in [false, true, false, true] {
        set_osxsave(on);
        OSXSAVE.unless(shown() == on)?;
    }
    let leaf = cpuid_count(0xD, 0);
    let mask = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
    NO_XSAVE.unless(mask & !KNOWN == 0)?;
    SIZES.unless(is_allowed(mask, mask) && mask & SSE != 0)?;

    // Every component has a place of its own behind the header.
    for (from, to) in components(mask) {
        let others = components(mask).filter(|other| *other != (from, to));
        let apart = others.clone().all(|other| to <= other.0 || other.1 <= from);
        SIZES.unless(from >= LEGACY && from < to && to as usize <= AREA && apart)?;
    }
    let bytes = |xcr0| components(xcr0).fold(LEGACY, |bytes, (_, to)| bytes.max(to));
    SIZES.unless(leaf.ecx == bytes(mask))?;

    for value in 0..1024 {
        let before = xgetbv();
        let run = xsetbv(0, value);
        if is_allowed(value, mask) {
            XCR0_REFUSED.unless(run.caught.is_none() && xgetbv() == value)?;
            SIZES.unless(cpuid_count(0xD, 0).ebx == bytes(value))?;
        } else {
            XCR0_TAKEN.unless(run.caught.is_some_and(Exception::is_gp0) && xgetbv() == before)?;
        }
    }
    for (register, value) in [(0, X87 | 1 << 32), (0, X87 | 1 << 63), (1, X87), (u32::MAX, X87)] {
        XCR0_TAKEN.unless(xsetbv(register, value).caught.is_some_and(Exception::is_gp0))?;
    }
    XCR0_REFUSED.unless(xsetbv(0, mask).caught.is_none() && xgetbv() == mask)?;
    Ok(mask)
}
