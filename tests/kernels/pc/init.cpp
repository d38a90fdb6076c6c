// The first process of the emulated PC: runs the program, prints how it ended, and never exits, as
// the first process mustn't. See emulated_pc.py.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>

int main(int, char** arguments) {
  std::puts("Linux runs, and starts the program");
  const pid_t child = fork();
  if (child == 0) {
    execv("/program", arguments);
    _exit(127);
  }
  int status = -1;
  waitpid(child, &status, 0);
  std::printf("ended with status %d\n", status);
  for (;;) pause();
}
