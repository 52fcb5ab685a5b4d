//! Several CPUs: starting the others, IPIs between them, waiting for each other.
//!
//! CPU `n` has x2APIC ID `n`. The first one, 0, runs the guest's main function; the others start in
//! real mode, by INIT and SIPI, and come to 64-bit mode with the page tables and the IDT of the
//! first, each with stacks and a TSS of its own. Their interrupts are off.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};
use core::{hint, mem, ptr};

pub use crate::area::MAX_CPUS;
use crate::area::{self, AREA_BYTES, FIRST, area_of};
use crate::cpu::{self, cpuid_count, now, rdmsr, wrmsr};
use crate::exit::{self, Failure};
use crate::paging::PAGE_TABLES;
use crate::{segments, trap};

/// Code of [`exit`](crate::exit).
pub const NOT_STARTED: Failure = Failure::new(exit::NOT_STARTED, "another CPU does not start");
/// Code of [`exit`](crate::exit).
pub const STUCK: Failure = Failure::new(exit::STUCK, "another CPU does not get on");

/// After as many ticks of the time-stamp counter what has not come will not come.
pub const PATIENCE: u64 = 2_000_000_000;
/// After as many a second SIPI goes out, as the manual has it (SDM volume 3, "Typical BSP
/// Initialization Sequence").
const SECOND_SIPI: u64 = 200_000;

/// The MSRs of the local APIC that guests use.
pub mod msr {
    /// IA32_APIC_BASE
    pub const APIC_BASE: u32 = 0x1B;
    /// IA32_TSC_DEADLINE
    pub const TSC_DEADLINE: u32 = 0x6E0;
    /// Local APIC ID.
    pub const ID: u32 = 0x802;
    /// Logical destination.
    pub const LDR: u32 = 0x80D;
    /// Spurious interrupt vector.
    pub const SVR: u32 = 0x80F;
    /// Interrupt request, the first of eight.
    pub const IRR: u32 = 0x820;
    /// Interrupt command.
    pub const ICR: u32 = 0x830;
    /// LVT timer.
    pub const LVT_TIMER: u32 = 0x832;
    /// Timer: initial count.
    pub const INITIAL_COUNT: u32 = 0x838;
    /// Timer: divide configuration.
    pub const DIVIDE: u32 = 0x83E;
    /// Self IPI.
    pub const SELF_IPI: u32 = 0x83F;
}

/// How many CPUs there are, 1 to [`MAX_CPUS`] (CPUID leaf 0xB, subleaf 1).
pub fn cpus() -> usize {
    static CPUS: AtomicU64 = AtomicU64::new(0);
    let known = CPUS.load(Ordering::Relaxed);
    if known != 0 {
        return known as usize;
    }
    let told = u64::from(cpuid_count(0xB, 1).ebx & 0xFFFF).clamp(1, MAX_CPUS as u64);
    CPUS.store(told, Ordering::Relaxed);
    told as usize
}

/// The number of this CPU, at any CPL.
pub fn this_cpu() -> usize {
    area::this_cpu()
}

/// All CPUs but one.
pub fn others(but: usize) -> impl Iterator<Item = usize> {
    (0..cpus()).filter(move |cpu| *cpu != but)
}

/// Reads a register that exists.
pub fn read(register: u32) -> u64 {
    match rdmsr(register) {
        Ok(value) => value,
        Err(exception) => trap::unexpected(exception),
    }
}

/// Writes a register that takes the value.
///
/// # Safety
///
/// The guest's code must survive it.
pub unsafe fn write(register: u32, value: u64) {
    // SAFETY: the caller vouches for it.
    if let Err(exception) = unsafe { wrmsr(register, value) } {
        trap::unexpected(exception);
    }
}

/// Puts the local APIC of this CPU into x2APIC mode, if it is not.
pub fn x2apic_mode() {
    const X2APIC_MODE: u64 = 3 << 10;
    let base = read(msr::APIC_BASE);
    if base & X2APIC_MODE != X2APIC_MODE {
        // SAFETY: the runtime uses the APIC in no other mode.
        unsafe { write(msr::APIC_BASE, base | X2APIC_MODE) };
    }
}

/// Lets the local APIC of this CPU, in x2APIC mode, take interrupts. They are counted, see
/// [`arrived`].
pub fn enable_apic() {
    const ENABLED: u64 = 0x1FF;
    /// Masks of the two 8259s. A PC's firmware leaves its timer running.
    const OTHER_INTERRUPTS: [u16; 2] = [0x21, 0xA1];
    x2apic_mode();
    for port in OTHER_INTERRUPTS {
        // SAFETY: nobody wants their interrupts.
        unsafe { cpu::out8(port, 0xFF) };
    }
    trap::take_interrupts();
    // SAFETY: all interrupts have handlers.
    unsafe { write(msr::SVR, ENABLED) };
}

/// How many interrupts of this vector, or NMIs, a CPU has taken.
pub fn arrived(cpu: usize, vector: u8) -> u64 {
    area_of(cpu).local.arrived[usize::from(vector)].load(Ordering::Acquire)
}

/// To whom an IPI goes.
#[derive(Clone, Copy, Debug)]
pub enum To {
    /// A CPU, by its ID.
    Cpu(usize),
    /// The CPUs that this 32-bit logical destination names.
    Logical(u32),
    /// The sender.
    Own,
    /// Everybody.
    All,
    /// Everybody else.
    Others,
}

/// What an IPI does.
#[derive(Clone, Copy, Debug)]
pub enum Ipi {
    /// Raises the interrupt of this vector.
    Fixed(u8),
    /// Raises an NMI.
    Nmi,
    /// Resets the CPU, which then waits for its start.
    Init,
    /// Starts it at the page of this number.
    Startup(u8),
}

/// Sends an IPI (SDM volume 3, "ICR Operation in x2APIC Mode").
pub fn send(to: To, ipi: Ipi) {
    const ASSERT: u64 = 1 << 14;
    let to = match to {
        To::Cpu(cpu) => (cpu as u64) << 32,
        To::Logical(destination) => u64::from(destination) << 32 | 1 << 11,
        To::Own => 1 << 18,
        To::All => 2 << 18,
        To::Others => 3 << 18,
    };
    let ipi = match ipi {
        Ipi::Fixed(vector) => vector.into(),
        Ipi::Nmi => 4 << 8,
        Ipi::Init => 5 << 8,
        Ipi::Startup(page) => 6 << 8 | u64::from(page),
    };
    // WRMSR to an APIC does not wait for stores before it.
    // SAFETY: (1) a fence only waits; (2) the guest has set up what may arrive.
    unsafe {
        asm!("mfence", options(nostack, preserves_flags));
        write(msr::ICR, to | ASSERT | ipi);
    }
}

/// Spins until `done`; false if that takes too long.
pub fn wait(done: impl FnMut() -> bool) -> bool {
    wait_for(PATIENCE, done)
}

/// Spins until `done`, at most for so many ticks; whether it came to be.
pub fn wait_for(ticks: u64, mut done: impl FnMut() -> bool) -> bool {
    let start = now();
    loop {
        if done() {
            return true;
        }
        if now().wrapping_sub(start) >= ticks {
            return done();
        }
        hint::spin_loop();
    }
}

/// Waits until all CPUs are here.
///
/// # Errors
///
/// [`STUCK`] if one does not come.
pub fn meet() -> Result<(), Failure> {
    static ARRIVALS: AtomicU64 = AtomicU64::new(0);
    let all = cpus() as u64;
    let arrival = ARRIVALS.fetch_add(1, Ordering::AcqRel);
    let last = (arrival / all + 1) * all;
    STUCK.unless(wait(|| ARRIVALS.load(Ordering::Acquire) >= last))
}

/// What a CPU found when it started, and what it is then to find by the manual (SDM volume 3,
/// "Processor State After Reset").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartState {
    /// Base of CS.
    pub code_base: u64,
    /// CR0; CD and NW are not changed by INIT.
    pub cr0: u64,
    /// CR4
    pub cr4: u64,
    /// IA32_EFER
    pub efer: u64,
}

/// How a CPU, other than the first, was when it last started.
pub fn start_state(cpu: usize) -> StartState {
    let [code_base, cr0, cr4, efer] =
        area_of(cpu).local.start_state.each_ref().map(|word| word.load(Ordering::Relaxed));
    StartState { code_base, cr0, cr4, efer }
}

/// How often a CPU has been started.
pub fn starts(cpu: usize) -> u64 {
    area_of(cpu).local.starts.load(Ordering::Acquire)
}

/// What a CPU runs when it is started, with its number. When it returns the CPU halts for good.
pub type Entry = extern "C" fn(usize);

/// Pages below 1 MiB where CPUs may be told to start.
pub const START_PAGES: [u8; 2] = [0x10, 0x11];

/// Puts what CPUs start with in its places.
fn prepare_start() {
    for page in START_PAGES {
        // SAFETY: (1) low memory is the guest's, and nothing else uses these pages; (2) the code
        // fits, as the assembler checks.
        unsafe {
            let code = &raw const trampoline;
            let bytes = &raw const trampoline_end as usize - code as usize;
            let to = ptr::without_provenance_mut::<u8>(usize::from(page) << 12);
            ptr::copy_nonoverlapping(code, to, bytes);
        }
    }
}

/// Resets a CPU other than this one, wherever it is, and starts it at `page`, one of
/// [`START_PAGES`], to run `entry`.
///
/// # Errors
///
/// [`NOT_STARTED`]
pub fn start(cpu: usize, page: u8, entry: Entry) -> Result<(), Failure> {
    prepare_start();
    area_of(cpu).local.entry.store(entry as usize as u64, Ordering::Release);
    let before = starts(cpu);
    start_up(To::Cpu(cpu), page, || starts(cpu) != before)
}

/// Resets all CPUs but this one and starts them to run `entry`.
///
/// # Errors
///
/// [`NOT_STARTED`]
pub fn start_others(entry: Entry) -> Result<(), Failure> {
    x2apic_mode();
    prepare_start();
    let own = this_cpu();
    let before: [u64; MAX_CPUS] = core::array::from_fn(starts);
    for cpu in others(own) {
        area_of(cpu).local.entry.store(entry as usize as u64, Ordering::Release);
    }
    start_up(To::Others, START_PAGES[0], || others(own).all(|cpu| starts(cpu) != before[cpu]))
}

fn start_up(to: To, page: u8, started: impl Fn() -> bool) -> Result<(), Failure> {
    send(to, Ipi::Init);
    send(to, Ipi::Startup(page));
    if wait_for(SECOND_SIPI, &started) {
        return Ok(());
    }
    // One that has started meanwhile does not mind.
    send(to, Ipi::Startup(page));
    NOT_STARTED.unless(wait(started))
}

/// Where a started CPU comes to Rust, on the main stack of its area.
extern "C" fn started(cpu: usize, code_base: u64, cr0: u64, cr4: u64, efer: u64) -> ! {
    segments::init(cpu);
    trap::load_idt();
    // SAFETY: no floating-point code runs yet on this CPU.
    unsafe { asm!("fninit", "ldmxcsr [{}]", in(reg) &0x1F80_u32, options(nostack)) };
    let local = area::local();
    local.recovery.store(0, Ordering::Relaxed);
    local.caught[0].store(0, Ordering::Relaxed);
    for (word, value) in local.start_state.iter().zip([code_base, cr0, cr4, efer]) {
        word.store(value, Ordering::Relaxed);
    }
    local.starts.fetch_add(1, Ordering::Release);
    let entry = local.entry.load(Ordering::Acquire) as usize;
    // SAFETY: stored as an `Entry` before the CPU was started.
    unsafe { mem::transmute::<usize, Entry>(entry)(cpu) };
    loop {
        // SAFETY: this CPU has nothing more to do.
        unsafe { asm!("cli", "hlt", options(nostack)) };
    }
}

/// A part of the guest that all CPUs run, each with its number.
pub type Job = fn(usize) -> Result<(), Failure>;

/// The job, and its number.
static JOB: AtomicU64 = AtomicU64::new(0);
static JOBS: AtomicU64 = AtomicU64::new(0);
/// How many jobs each CPU has done.
static DONE: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// An [`Entry`]: does jobs until the guest ends.
pub extern "C" fn work(cpu: usize) {
    enable_apic();
    loop {
        let done = DONE[cpu].load(Ordering::Relaxed);
        while JOBS.load(Ordering::Acquire) == done {
            hint::spin_loop();
        }
        let job = JOB.load(Ordering::Relaxed) as usize;
        // SAFETY: stored as a `Job` before its number.
        if let Err(failure) = unsafe { mem::transmute::<usize, Job>(job)(cpu) } {
            exit::fail(failure);
        }
        DONE[cpu].store(done + 1, Ordering::Release);
    }
}

/// Runs `job` on all CPUs. The others must be at [`work`], and this one be the first.
///
/// # Errors
///
/// That of this CPU, or [`STUCK`]. That of another ends the guest at once.
pub fn together(job: Job) -> Result<(), Failure> {
    JOB.store(job as usize as u64, Ordering::Relaxed);
    let jobs = JOBS.load(Ordering::Relaxed) + 1;
    JOBS.store(jobs, Ordering::Release);
    job(0)?;
    STUCK.unless(wait(|| others(0).all(|cpu| DONE[cpu].load(Ordering::Acquire) == jobs)))
}

unsafe extern "C" {
    /// Start and end of the code that a CPU starts with.
    safe static trampoline: u8;
    safe static trampoline_end: u8;
}

// The trampoline, copied to its pages, runs in real mode, wherever CS says. It goes to 64-bit mode in
// one step (SDM volume 3, "Initializing IA-32e Mode") and leaves the pages; EBP, ESI, EDI and ESP
// keep the base of CS, CR0, CR4 and EFER.
global_asm!(
    r#"
    .pushsection .text.trampoline, "ax"
    .balign 16
    .code16
trampoline:
    cli
    cld
    mov ax, cs
    mov ds, ax
    movzx ebp, ax
    shl ebp, 4
    mov esi, cr0
    mov edi, cr4
    // LGDT with a base of 32 bits.
    .byte 0x66
    lgdt [trampoline_gdt_at]
    mov eax, 0x620
    mov cr4, eax
    mov eax, offset {tables}
    mov cr3, eax
    mov ecx, 0xC0000080
    rdmsr
    mov esp, eax
    or eax, 0x100
    wrmsr
    mov eax, 0x80000033
    mov cr0, eax
    // Far jump with a 32-bit offset.
    .byte 0x66, 0xEA
    .long other_long_mode
    .word {code}
    .balign 8
trampoline_gdt:
    .word {gdt_entries} * 8 - 1
    .long {gdt}
trampoline_end:
    .set trampoline_gdt_at, trampoline_gdt - trampoline
    // An error if it does not fit.
    .org trampoline + 0x1000

    .code64
other_long_mode:
    mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov r8d, esp
    mov r9d, esi
    mov r10d, edi
    // The initial APIC ID tells the area.
    mov eax, 1
    cpuid
    shr ebx, 24
    cmp ebx, {max_cpus}
    jae 2f
    lea eax, [ebx + 1]
    imul eax, eax, {area_bytes}
    lea rsp, [rax + {first}]
    mov edi, ebx
    mov esi, ebp
    mov edx, r9d
    mov ecx, r10d
    call {started}
    ud2
2:  hlt
    jmp 2b
    .popsection
    "#,
    tables = sym PAGE_TABLES,
    code = const segments::code(0),
    data = const segments::data(0),
    gdt = sym segments::GDT,
    gdt_entries = const segments::GDT_ENTRIES,
    max_cpus = const MAX_CPUS,
    area_bytes = const AREA_BYTES,
    first = sym FIRST,
    started = sym started,
);
