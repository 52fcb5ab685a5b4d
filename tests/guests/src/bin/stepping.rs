//! Split locks at which something else happens as well. By words on the command line:
//!
//! | word | |
//! |---|---|
//! | `trap` | a single step, by EFLAGS.TF, of a split lock |
//! | `fault` | one whose second page is absent, one whose second page is read-only |
//! | `hole` | one whose second page is where the machine has no memory |
//! | `storm` | on all CPUs: timer interrupts, IPIs and NMIs come meanwhile, and their handlers split locks themselves |
//! | `unmap` | on all CPUs but the last, which takes away the pages of the others meanwhile |
//!
//! Without any, the first three. `count=N`: that many rounds of the last two.
//!
//! Exit codes: success; 0x30 to 0x3A, see the constants.

#![no_std]
#![no_main]

use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use guests::cpu::{self, disable_interrupts, enable_interrupts};
use guests::exit::Failure;
use guests::random::Random;
use guests::smp::{self, Ipi, MAX_CPUS, To, arrived, cpus, meet, msr, send, wait, work, write};
use guests::trap::{on_interrupt, set_handler, vector, with_handler};
use guests::{Boot, guest, paging, println};

guest!(main);

const TRAPS: Failure = Failure::new(0x30, "a single step does not end behind each instruction");
const SUM: Failure = Failure::new(0x31, "a locked addition is lost or double");
const NO_FAULT: Failure = Failure::new(0x32, "not one page fault where one was due");
const ERROR: Failure = Failure::new(0x33, "the page fault has another error code");
const ADDRESS: Failure = Failure::new(0x34, "the page fault has another address");
const OLD: Failure = Failure::new(0x35, "what is not there does not read as ones");
const NEW: Failure = Failure::new(0x36, "the half that is there was not written");
const LOST: Failure = Failure::new(0x37, "an interrupt or NMI does not arrive");
const HANDLED: Failure = Failure::new(0x38, "a handler's addition is lost or double");
const QUIET: Failure = Failure::new(0x39, "the timer was silent");
const ALONE: Failure = Failure::new(0x3A, "there is only one CPU");

/// CR0.WP.
const WRITE_PROTECT: u64 = 1 << 16;
/// Bits of a page table's entry.
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
/// Error codes of a write at CPL 0 to a page that is absent, and to one that is read-only.
const ABSENT: u64 = 0b10;
const READ_ONLY: u64 = 0b11;

/// Vectors.
const TIMER: u8 = 0x41;
const CALL: u8 = 0x42;
const VECTORS: [u8; 3] = [TIMER, CALL, vector::NMI];
/// Ticks from one timer interrupt to the next: a prime, so that they come anywhere.
const PERIOD: u64 = 7001;
/// Local APIC timer: periodic, not divided.
const PERIODIC: u64 = 1 << 17;
const UNDIVIDED: u64 = 0b1011;

/// Two cache lines.
#[repr(C, align(64))]
struct Lines(UnsafeCell<[u8; 128]>);
// SAFETY: each is changed by locked instructions of one CPU alone.
unsafe impl Sync for Lines {}

impl Lines {
    const fn new() -> Self {
        Self(UnsafeCell::new([0; 128]))
    }

    /// The number across the two lines.
    fn number(&self) -> *mut u64 {
        self.0.get().cast::<u8>().wrapping_add(60).cast()
    }
}

/// What the handlers of each CPU, and its main program, count.
static COUNTS: [[Lines; VECTORS.len() + 1]; MAX_CPUS] =
    [const { [const { Lines::new() }; VECTORS.len() + 1] }; MAX_CPUS];
const MAIN: usize = VECTORS.len();

/// Two pages of each CPU.
#[repr(C, align(4096))]
struct Pages(UnsafeCell<[u8; 8192]>);
// SAFETY: each is changed by locked instructions of one CPU alone.
unsafe impl Sync for Pages {}

static PAGES: [Pages; MAX_CPUS] = [const { Pages(UnsafeCell::new([0; 8192])) }; MAX_CPUS];

static ROUNDS: AtomicU64 = AtomicU64::new(0);

/// Adds 1 to a number.
///
/// # Safety
///
/// It is the caller's to change.
unsafe fn add(number: *mut u64) {
    // SAFETY: the caller's obligation.
    unsafe { asm!("lock add qword ptr [{}], 1", in(reg) number, options(nostack)) };
}

/// What a number is.
fn value(number: *const u64) -> u64 {
    // SAFETY: one of the numbers above; whoever changes it is done, or this CPU.
    unsafe { number.read_unaligned() }
}

// ---- trap --------------------------------------------------------------------------------------

const MAX_TRAPS: usize = 16;
static TRAPPED: AtomicU64 = AtomicU64::new(0);
static TRAPPED_AT: [AtomicU64; MAX_TRAPS] = [const { AtomicU64::new(0) }; MAX_TRAPS];

/// #DB: notes where it returns to.
#[unsafe(naked)]
unsafe extern "C" fn on_debug() {
    naked_asm!(
        "push rax",
        "push rdx",
        "push rcx",
        "mov rax, [rip + {trapped}]",
        "cmp rax, {max}",
        "jae 2f",
        "lea rdx, [rip + {at}]",
        "mov rcx, [rsp + 24]",
        "mov [rdx + 8 * rax], rcx",
        "inc qword ptr [rip + {trapped}]",
        "2:",
        "pop rcx",
        "pop rdx",
        "pop rax",
        "iretq",
        trapped = sym TRAPPED,
        at = sym TRAPPED_AT,
        max = const MAX_TRAPS,
    )
}

fn trap() -> Result<(), Failure> {
    let number = COUNTS[0][MAIN].number();
    let before = value(number);
    // SAFETY: (1) the handler changes nothing; (2) the number is this CPU's.
    unsafe {
        with_handler(vector::DEBUG, on_debug, || {
            let (behind_lock, behind_nop): (u64, u64);
            asm!(
                "lea {lock}, [rip + 2f]",
                "lea {nop}, [rip + 3f]",
                "pushfq",
                "or qword ptr [rsp], 0x100",
                "popfq",
                "lock add qword ptr [{number}], 1",
                "2: nop",
                "3: pushfq",
                "and qword ptr [rsp], ~0x100",
                "popfq",
                number = in(reg) number,
                lock = out(reg) behind_lock,
                nop = out(reg) behind_nop,
            );
            TRAPS.unless(
                TRAPPED_AT[0].load(Ordering::Relaxed) == behind_lock
                    && TRAPPED_AT[1].load(Ordering::Relaxed) == behind_nop,
            )
        })?;
    }
    SUM.unless(value(number) == before + 1)
}

// ---- fault -------------------------------------------------------------------------------------

static FAULTS: AtomicU64 = AtomicU64::new(0);
static FAULT_ERROR: AtomicU64 = AtomicU64::new(0);
static FAULT_ADDRESS: AtomicU64 = AtomicU64::new(0);

/// #PF of a small page: makes it present and writable, and has the instruction executed again.
#[unsafe(naked)]
unsafe extern "C" fn on_page_fault() {
    naked_asm!(
        "push rax",
        "push rdx",
        "lock inc qword ptr [rip + {faults}]",
        "mov rax, [rsp + 16]",
        "mov [rip + {error}], rax",
        "mov rax, cr2",
        "mov [rip + {address}], rax",
        "mov rdx, rax",
        "shr rdx, 12",
        "and edx, 511",
        "shl edx, 3",
        "add rdx, [rip + {table}]",
        "lock or qword ptr [rdx], {usable}",
        "invlpg [rax]",
        "pop rdx",
        "pop rax",
        "add rsp, 8",
        "iretq",
        faults = sym FAULTS,
        error = sym FAULT_ERROR,
        address = sym FAULT_ADDRESS,
        table = sym TABLE,
        usable = const PRESENT | WRITABLE,
    )
}

/// Address of the small pages' entries.
static TABLE: AtomicU64 = AtomicU64::new(0);

/// Shows a CPU's two pages as two small ones; the number across them.
fn two_pages(cpu: usize) -> *mut u64 {
    let physical = PAGES[cpu].0.get() as u64;
    paging::show(2 * cpu, physical);
    paging::show(2 * cpu + 1, physical + 4096);
    paging::small_page(2 * cpu).wrapping_add(4092).cast()
}

fn fault() -> Result<(), Failure> {
    // SAFETY: compiled code writes to no page that is read-only.
    unsafe { cpu::set_cr0(cpu::cr0() | WRITE_PROTECT) };
    let number = two_pages(0);
    let second = paging::small_page(1);
    for (missing, error) in [(PRESENT, ABSENT), (WRITABLE, READ_ONLY)] {
        let before = value(number);
        let faults = FAULTS.load(Ordering::Relaxed);
        paging::small_entry(1).fetch_and(!missing, Ordering::Relaxed);
        paging::forget(second);
        // SAFETY: the handler makes the page usable; the number is this CPU's.
        unsafe { with_handler(vector::PAGE_FAULT, on_page_fault, || add(number)) };
        NO_FAULT.unless(FAULTS.load(Ordering::Relaxed) == faults + 1)?;
        ERROR.unless(FAULT_ERROR.load(Ordering::Relaxed) == error)?;
        ADDRESS.unless(FAULT_ADDRESS.load(Ordering::Relaxed) == second as u64)?;
        SUM.unless(value(number) == before + 1)?;
    }
    Ok(())
}

// ---- hole --------------------------------------------------------------------------------------

fn hole(boot: &Boot) -> Result<(), Failure> {
    /// Far enough behind the memory.
    const BEHIND: u64 = 16 << 20;
    let first = two_pages(0);
    paging::show(1, boot.memory_end.next_multiple_of(4096) + BEHIND);
    paging::forget(paging::small_page(1));
    let number = first.cast::<u8>().wrapping_add(2).cast::<u32>();
    let half = number.cast::<u16>();
    // SAFETY: this CPU's page, and what is nobody's.
    let (old, new) = unsafe {
        half.write_volatile(0x1234);
        let mut value = 0x0001_0001_u32;
        asm!("lock xadd dword ptr [{}], {:e}", in(reg) number, inout(reg) value, options(nostack));
        (value, half.read_volatile())
    };
    OLD.unless(old == 0xFFFF_1234)?;
    NEW.unless(new == 0x1235)
}

// ---- storm -------------------------------------------------------------------------------------

fn handle<const KIND: usize>() {
    // SAFETY: no handler of a vector interrupts itself.
    unsafe { add(COUNTS[smp::this_cpu()][KIND].number()) };
}

/// Each CPU calls the next one, itself if there is no other, and splits locks until the call has arrived.
fn storm(cpu: usize) -> Result<(), Failure> {
    let next = (cpu + 1) % cpus();
    let number = COUNTS[cpu][MAIN].number();
    let before = value(number);
    let mut added = 0;
    meet()?;
    // SAFETY: the handlers are there.
    unsafe {
        write(msr::DIVIDE, UNDIVIDED);
        write(msr::LVT_TIMER, PERIODIC | u64::from(TIMER));
        write(msr::INITIAL_COUNT, PERIOD);
    }
    enable_interrupts();
    for _ in 0..ROUNDS.load(Ordering::Relaxed) {
        let calls = [CALL, vector::NMI].map(|vector| (vector, arrived(next, vector) + 1));
        send(To::Cpu(next), Ipi::Fixed(CALL));
        send(To::Cpu(next), Ipi::Nmi);
        LOST.unless(wait(|| {
            // SAFETY: this CPU's.
            unsafe { add(number) };
            added += 1;
            calls.iter().all(|(vector, count)| arrived(next, *vector) == *count)
        }))?;
    }
    // SAFETY: no more of them are to come.
    unsafe { write(msr::INITIAL_COUNT, 0) };
    // Others may still call. After that, what is under way arrives.
    meet()?;
    let timed = arrived(cpu, TIMER);
    smp::wait_for(2 * PERIOD, || false);
    disable_interrupts();
    meet()?;
    SUM.unless(value(number) == before + added)?;
    QUIET.unless(timed > 0)?;
    let handled = |kind: usize| value(COUNTS[cpu][kind].number());
    HANDLED.unless((0..VECTORS.len()).all(|kind| handled(kind) == arrived(cpu, VECTORS[kind])))
}

// ---- unmap -------------------------------------------------------------------------------------

/// The longest time between two pages that are taken away, in ticks.
const LONGEST: u64 = 20_000;
/// CPUs that are not done.
static SPLITTING: AtomicU64 = AtomicU64::new(0);

fn unmap(cpu: usize) -> Result<(), Failure> {
    let last = cpus() - 1;
    if cpu != last {
        SPLITTING.fetch_add(1, Ordering::AcqRel);
    }
    meet()?;
    if cpu == last {
        let mut random = Random::new(1, 0);
        while SPLITTING.load(Ordering::Acquire) > 0 {
            let other = random.below(last as u64) as usize;
            paging::small_entry(2 * other + 1).fetch_and(!PRESENT, Ordering::Relaxed);
            // Whoever runs has to get on meanwhile.
            smp::wait_for(random.below(LONGEST), || SPLITTING.load(Ordering::Acquire) == 0);
        }
        return Ok(());
    }
    let number = paging::small_page(2 * cpu).wrapping_add(4092).cast::<u64>();
    let rounds = ROUNDS.load(Ordering::Relaxed);
    for _ in 0..rounds {
        // SAFETY: this CPU's, whose handler makes the pages usable.
        unsafe { add(number) };
    }
    SPLITTING.fetch_sub(1, Ordering::AcqRel);
    let physical = PAGES[cpu].0.get().cast::<u8>().wrapping_add(4092).cast::<u64>();
    SUM.unless(value(physical) == rounds)
}

fn main(boot: &Boot) -> Result<(), Failure> {
    const PARTS: [&str; 5] = ["trap", "fault", "hole", "storm", "unmap"];
    println!("split locks at which something else happens, {} CPUs", cpus());
    TABLE.store(paging::small_entry(0).as_ptr() as u64, Ordering::Relaxed);
    ROUNDS.store(boot.number("count").unwrap_or(20), Ordering::Relaxed);
    let any = PARTS.iter().any(|part| boot.has(part));
    let wanted = |part, usual: bool| if any { boot.has(part) } else { usual };
    if wanted("unmap", false) {
        ALONE.unless(cpus() > 1)?;
        (0..cpus()).for_each(|cpu| {
            two_pages(cpu);
        });
    }
    if wanted("storm", false) || wanted("unmap", false) {
        smp::enable_apic();
        on_interrupt(TIMER, handle::<0>);
        on_interrupt(CALL, handle::<1>);
        on_interrupt(vector::NMI, handle::<2>);
        if cpus() > 1 {
            smp::start_others(work)?;
        }
    }
    if wanted("storm", false) {
        smp::together(storm)?;
    }
    if wanted("unmap", false) {
        // SAFETY: it serves all CPUs' small pages, and there are no other page faults.
        unsafe { set_handler(vector::PAGE_FAULT, on_page_fault) };
        smp::together(unmap)?;
        println!("{} page faults", FAULTS.load(Ordering::Relaxed));
    }
    if wanted("trap", true) {
        trap()?;
    }
    if wanted("fault", true) {
        fault()?;
    }
    if wanted("hole", true) {
        hole(boot)?;
    }
    Ok(())
}
