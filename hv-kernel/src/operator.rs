//! The console: carries out what an operator types on a serial port that has the log.
//!
//! Only the boot CPU does it, between two turns of its tasks, a step in [`POLL_TICKS`] while there are
//! any: it looks at the ports, writes one line of an answer, zeroes 2 MiB of a VM that is to be made,
//! asks whether others have done their part. Nothing of it waits for anything, so that the VMs go on
//! meanwhile. What others have to do, they are told by mail ([`vmx::mailbox`]) and do when they get
//! to it.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Display;

use arrayvec::ArrayVec;
use vmx::instruction::now;
use vmx::run::End;

use crate::console;
use crate::counters::Counters;
use crate::fleet::{self, Place};
use crate::memory;
use crate::monitor::{self, Command, Editor, Typed};
use crate::percpu::{self, MAX_CPUS};
use crate::sched::{self, Cpu};
use crate::summary;
use crate::vm::{Plan, Reason, StartError, Vm};

/// How long guests have the CPU before the console has its turn again, in ticks of the TSC: a third of a
/// millisecond on a CPU of 3 GHz, in which four characters come in. A UART holds 16.
const POLL_TICKS: u64 = 1_000_000;
/// How long vCPUs may take to answer, in ticks of the TSC. One that waits for a CPU or is held out of
/// its guest answers late.
const PATIENCE: u64 = 1_000_000_000;
/// What may have come in and not be looked at yet, in bytes.
const INPUT: usize = 64;

/// What there is to do for a command, apart from the lines of its answer.
enum Job {
    /// vCPUs have been asked what they have counted, for this answer, until then at the latest (TSC).
    Ask(Answer, u64),
    /// vCPUs have been told their VM's new policy.
    Policy(&'static Place, u64),
    /// A VM was ended, and its vCPUs go.
    Stop(&'static Place, u64),
    /// A VM is to be made, once nothing is left of the one before.
    Start(usize, Option<Plan>),
}

/// An answer with numbers in it.
#[derive(Clone, Copy)]
enum Answer {
    List,
    Show(&'static Place),
}

/// The console.
pub struct Operator {
    input: ArrayVec<u8, INPUT>,
    editor: Editor,
    /// Lines that are to be written.
    answer: VecDeque<String>,
    job: Option<Job>,
    /// For each VM, whether the run stays open for it: it was stopped, and may be started again.
    keeps: Vec<bool>,
    /// When it is the console's turn again (TSC).
    next_turn: u64,
    /// The prompt is to be written.
    wants_prompt: bool,
    /// All is to end.
    quits: bool,
}

impl Operator {
    /// Nobody has typed anything.
    pub fn new() -> Self {
        Self {
            input: ArrayVec::new(),
            editor: Editor::default(),
            answer: VecDeque::from([String::from("console: type help")]),
            job: None,
            keeps: fleet::places().iter().map(|_| false).collect(),
            next_turn: 0,
            wants_prompt: true,
            quits: false,
        }
    }

    /// When it is the console's turn again (TSC).
    pub fn due(&self) -> u64 {
        self.next_turn
    }

    /// Whether there is something to do that waits for nothing but this CPU.
    pub fn is_busy(&self) -> bool {
        !self.answer.is_empty()
            || !self.input.is_empty() && self.job.is_none() && !self.quits
            || matches!(self.job, Some(Job::Start(_, Some(_))))
    }

    /// Whether it is the console's turn, and there is something to do that a guest's turn should end
    /// for.
    pub fn is_waiting(&mut self) -> bool {
        if now() < self.next_turn {
            return false;
        }
        self.listen();
        let is_waiting = self.is_busy() || self.job.is_some();
        if !is_waiting {
            self.wait();
        }
        is_waiting
    }

    /// Guests have the CPU for so long.
    fn wait(&mut self) {
        self.next_turn = now().saturating_add(POLL_TICKS);
    }

    fn listen(&mut self) {
        let Self { input, .. } = self;
        let room = input.remaining_capacity();
        // If another CPU is writing, the bytes wait.
        console::try_with(|console| console.receive(room, |byte| input.push(byte)));
    }

    /// One step, if it is the console's turn or the CPU has nothing else to do.
    pub fn attend(&mut self, cpu: &mut Cpu, is_idle: bool) {
        if now() < self.next_turn && !(is_idle && self.is_busy()) {
            return;
        }
        self.listen();
        if let Some(line) = self.answer.pop_front() {
            console::with(|console| console.answer(&line));
        } else if self.job.is_some() {
            self.go_on(cpu);
        } else if !self.quits {
            // A VM that was started now would keep the run from its end.
            if core::mem::take(&mut self.wants_prompt) {
                console::with(|console| console.typing(monitor::PROMPT));
            }
            self.read(cpu);
        }
        self.let_go(cpu);
        self.wait();
    }

    fn say(&mut self, line: impl Display) {
        self.answer.push_back(line.to_string());
    }

    /// Looks at what has come in, up to the end of a line.
    fn read(&mut self, cpu: &mut Cpu) {
        for index in 0..self.input.len() {
            let typed = self.editor.take(self.input[index]);
            let Typed::Line(line) = typed else {
                console::with(|console| echo(console, &self.editor, &typed));
                continue;
            };
            self.input.drain(..=index);
            self.wants_prompt = true;
            let shown = line.as_ref().map_or("", |line| line.as_str());
            console::with(|console| console.typed(format_args!("{}{shown}", monitor::PROMPT)));
            match line {
                Ok(line) => match Command::parse(&line) {
                    Some(Ok(command)) => self.carry_out(command, cpu),
                    Some(Err(why)) => self.say(why),
                    None => {}
                },
                Err(why) => self.say(why),
            }
            return;
        }
        self.input.clear();
    }

    fn carry_out(&mut self, command: Command<'_>, cpu: &mut Cpu) {
        let name = match command {
            Command::Help => return self.answer.extend(monitor::help()),
            Command::List => return self.ask(Answer::List, cpu),
            Command::Quit => return self.quit(cpu),
            Command::Show(name)
            | Command::Policy(name, _)
            | Command::Stop(name)
            | Command::Start(name)
            | Command::Restart(name) => name,
        };
        let Some((index, place)) = fleet::find(name) else {
            return self.say(format_args!("no VM is named `{name}`: `list` shows all"));
        };
        let running = place.running();
        match (command, running) {
            (Command::Show(_), _) => self.ask(Answer::Show(place), cpu),
            (Command::Policy(_, policy), Some(vm)) => match vm.set_policy(policy) {
                Ok(()) => {
                    summary::policy(vm.name, policy);
                    for slot in &vm.vcpus {
                        slot.mailbox.post_policy();
                        cpu.deliver(&vm, slot);
                    }
                    self.job = Some(Job::Policy(place, now().saturating_add(PATIENCE)));
                }
                Err(why) => self.say(why),
            },
            (Command::Stop(_), Some(vm)) => {
                if self.keep(index) {
                    cpu.end_vm(&vm, Reason::Stopped);
                    self.job = Some(Job::Stop(place, now().saturating_add(PATIENCE)));
                }
            }
            (Command::Start(_), Some(_)) => {
                self.say(format_args!("VM {name} runs: `restart` ends it first"));
            }
            (Command::Restart(_), Some(vm)) => {
                if self.keep(index) {
                    cpu.end_vm(&vm, Reason::Stopped);
                    self.job = Some(Job::Start(index, None));
                }
            }
            (Command::Start(_) | Command::Restart(_), None) => {
                if self.keep(index) {
                    self.job = Some(Job::Start(index, None));
                }
            }
            _ => self.say(format_args!("VM {name} does not run")),
        }
    }

    /// Keeps the run open for this VM. False if it is over already, and so is all else.
    fn keep(&mut self, index: usize) -> bool {
        self.keeps[index] = self.keeps[index] || sched::hold();
        self.keeps[index]
    }

    /// The run is not kept open for VMs that have ended by themselves.
    fn let_go(&mut self, cpu: &Cpu) {
        for (index, place) in fleet::places().iter().enumerate() {
            let starts = matches!(self.job, Some(Job::Start(which, _)) if which == index);
            if self.keeps[index]
                && !starts
                && place.is_vacant()
                && (self.quits || !place.was_stopped())
            {
                self.keeps[index] = false;
                cpu.release();
            }
        }
    }

    fn quit(&mut self, cpu: &Cpu) {
        (self.quits, self.wants_prompt) = (true, false);
        fleet::places().iter().filter_map(Place::running).for_each(|vm| {
            cpu.end_vm(&vm, Reason::Stopped);
        });
        log::info!("all VMs are stopped: quit");
    }

    /// Asks all vCPUs that the answer is about what they have counted.
    fn ask(&mut self, answer: Answer, cpu: &Cpu) {
        for vm in answer.places().iter().filter_map(Place::running) {
            for slot in &vm.vcpus {
                *slot.inspected.lock() = None;
                slot.mailbox.post_inspect();
                cpu.deliver(&vm, slot);
            }
        }
        self.job = Some(Job::Ask(answer, now().saturating_add(PATIENCE)));
    }

    /// Goes on with what there is to do.
    fn go_on(&mut self, cpu: &mut Cpu) {
        let Some(job) = self.job.take() else { return };
        let later = match job {
            Job::Ask(answer, until) => {
                let mut vms = answer.places().iter().filter_map(Place::running);
                if now() < until && !vms.all(|vm| has_answered(&vm)) {
                    Some(Job::Ask(answer, until))
                } else {
                    match answer {
                        Answer::List => self.answer.extend(list()),
                        Answer::Show(place) => self.answer.extend(show(place)),
                    }
                    None
                }
            }
            Job::Policy(place, until) => match place.running() {
                Some(vm) if !vm.is_policy_in_force() && now() < until => {
                    Some(Job::Policy(place, until))
                }
                Some(vm) => {
                    let late = if vm.is_policy_in_force() { "" } else { ", not yet for all vCPUs" };
                    self.say(format_args!("VM {}: policy {}{late}", vm.name, vm.policy().policy()));
                    None
                }
                None => {
                    self.say(format_args!("VM {} has ended", place.config.name));
                    None
                }
            },
            // That it is stopped, or has ended by itself just before, the log says.
            Job::Stop(place, until) => {
                let goes = !place.is_vacant() && now() < until;
                goes.then_some(Job::Stop(place, until))
            }
            Job::Start(index, plan) => {
                let place = &fleet::places()[index];
                match self.start(index, place, plan, cpu) {
                    Ok(later) => later,
                    Err(why) => {
                        place.refuse(&why);
                        None
                    }
                }
            }
        };
        self.job = later;
    }

    /// The next step of making a VM.
    fn start(
        &mut self,
        index: usize,
        place: &'static Place,
        plan: Option<Plan>,
        cpu: &Cpu,
    ) -> Result<Option<Job>, StartError> {
        let Some(mut plan) = plan else {
            let plan = if place.is_vacant() { Some(place.plan()?) } else { None };
            return Ok(Some(Job::Start(index, plan)));
        };
        if !plan.fill()? {
            return Ok(Some(Job::Start(index, Some(plan))));
        }
        place.start(plan, &mut [0; MAX_CPUS], |task, target| cpu.send(task, target))?;
        // From now on the VM keeps the run open itself.
        self.keeps[index] = false;
        Ok(None)
    }
}

impl Answer {
    fn places(self) -> &'static [Place] {
        match self {
            Self::List => fleet::places(),
            Self::Show(place) => core::slice::from_ref(place),
        }
    }
}

fn echo(console: &mut console::Console, editor: &Editor, typed: &Typed) {
    // Something was written in between: the line is shown again.
    let is_new = !console.is_typing();
    match typed {
        Typed::Nothing | Typed::Line(_) => {}
        Typed::Added(_) | Typed::Erased if is_new => {
            console.typing(monitor::PROMPT);
            console.typing(editor.line());
        }
        Typed::Added(character) => console.typing(character.encode_utf8(&mut [0; 4])),
        Typed::Erased => console.typing("\x08 \x08"),
        Typed::Dropped => {
            console.typing("\r\n");
            console.typing(monitor::PROMPT);
        }
    }
}

fn has_answered(vm: &Vm) -> bool {
    vm.is_over() || vm.vcpus.iter().all(|slot| slot.inspected.lock().is_some())
}

fn state(place: &Place) -> String {
    match (place.vm(), place.last()) {
        (Some(vm), _) if !vm.is_over() => String::from("runs"),
        (_, Some(last)) => match last.reason {
            Reason::End(End::Exit(status)) => format!("ended: exit {status}"),
            Reason::Stopped => String::from("stopped"),
            reason => format!("ended: {reason}"),
        },
        (Some(_), None) => String::from("ends"),
        (None, None) => String::from("was not started"),
    }
}

/// What a VM has counted, of the last time if it does not run. vCPUs that have not answered count
/// nothing.
fn sum(place: &Place) -> Counters {
    let mut sum = place.last().map_or(Counters::new(), |last| last.counters);
    if let Some(vm) = place.running() {
        for slot in &vm.vcpus {
            if let Some(inspected) = &*slot.inspected.lock() {
                sum.add(&inspected.counters);
            }
        }
    }
    sum
}

fn list() -> Vec<String> {
    let heading = ["VM", "state", "policy", "source", "vCPUs", "runs", "split locks", "exits"];
    let rows = fleet::places().iter().map(|place| {
        let sum = sum(place);
        let (policy, source) = match place.running() {
            Some(vm) => (vm.policy().policy().to_string(), vm.source.to_string()),
            None => (String::from("-"), String::from("-")),
        };
        [
            place.config.name.clone(),
            state(place),
            policy,
            source,
            place.config.vcpus.to_string(),
            place.runs().to_string(),
            sum.split_locks.seen().to_string(),
            sum.all_exits().to_string(),
        ]
    });
    let rows: Vec<_> = core::iter::once(heading.map(String::from)).chain(rows).collect();
    let mut lines = monitor::table(&rows);
    lines.push(format!(
        "{} CPUs, {} KiB of memory free",
        percpu::online().count_ones(),
        memory::free_bytes() >> 10
    ));
    lines
}

fn show(place: &Place) -> Vec<String> {
    let name = &place.config.name;
    let mut lines = Vec::new();
    let Some(vm) = place.running() else {
        lines.push(format!("VM {name}: {}", state(place)));
        if let Some(last) = place.last() {
            lines.extend(monitor::counted("all vCPUs", &last.counters));
        }
        return lines;
    };
    lines.push(format!(
        "VM {name}: runs, policy {}, {} MiB, weight {}",
        vm.policy().policy(),
        vm.memory.len() >> 20,
        vm.placement.weight
    ));
    for (index, slot) in vm.vcpus.iter().enumerate() {
        match &*slot.inspected.lock() {
            Some(inspected) => {
                let of = format!("vCPU {index} on CPU {}", inspected.cpu);
                lines.extend(monitor::counted(&of, &inspected.counters));
            }
            None => lines.push(format!("vCPU {index} has not answered: it waits for a CPU")),
        }
    }
    lines
}
