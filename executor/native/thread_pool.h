// Threads that sleep until a call wants help. Every call leases its own, so that several calls can run at once.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace pool {

using Function = void (*)(void* context);

class Worker {
  public:
    explicit Worker(int nice) : nice(nice) {
        // Signals are for the program's own threads; a new thread inherits what is blocked.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            std::thread(&Worker::loop, this).detach();
        } catch (...) {
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            throw;
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    void give(Function function, void* context) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            function_ = function, context_ = context;
        }
        wake_.notify_one();
    }
    // Takes the work back if it has not begun; waits for its end otherwise.
    void finish() {
        std::unique_lock<std::mutex> lock(mutex_);
        function_ = nullptr;
        done_.wait(lock, [this] { return !running_; });
    }

    const int nice;

  private:
    void loop() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return function_ != nullptr; });
            const Function function = function_;
            function_ = nullptr;
            running_ = true;
            lock.unlock();
            function(context_);
            lock.lock();
            running_ = false;
            done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Function function_ = nullptr;
    void* context_ = nullptr;
    bool running_ = false;
};

struct Pool {
    std::mutex mutex;
    std::vector<Worker*> idle;
};

// Never freed: workers may outlive static objects. A forked child has none of the threads and begins anew; the
// address of the old pool is forgotten, and its few bytes with it.
inline std::atomic<Pool*> current{nullptr};

inline Pool& instance() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
    (void)registered;
    Pool* pool = current.load();
    if (!pool) {
        Pool* fresh = new Pool;
        if (current.compare_exchange_strong(pool, fresh))
            pool = fresh;
        else
            delete fresh;
    }
    return *pool;
}

// Runs function(context) on this thread and up to `threads` - 1 others; returns when all are done. A thread that
// cannot be had is done without. The threads have the niceness of their caller.
inline void run(int64_t threads, Function function, void* context) {
    std::vector<Worker*> leased;
    if (threads > 1) {
        Pool& pool = instance();
        const int nice = getpriority(PRIO_PROCESS, 0);
        leased.reserve(threads - 1);
        {
            const std::lock_guard<std::mutex> lock(pool.mutex);
            for (size_t i = pool.idle.size(); i-- > 0 && static_cast<int64_t>(leased.size()) < threads - 1;) {
                if (pool.idle[i]->nice != nice) continue;
                leased.push_back(pool.idle[i]);
                pool.idle.erase(pool.idle.begin() + i);
            }
        }
        try {
            while (static_cast<int64_t>(leased.size()) < threads - 1) leased.push_back(new Worker(nice));
        } catch (const std::exception&) {
        }
        for (Worker* worker : leased) worker->give(function, context);
    }
    function(context);
    if (leased.empty()) return;
    for (Worker* worker : leased) worker->finish();
    Pool& pool = instance();
    const std::lock_guard<std::mutex> lock(pool.mutex);
    pool.idle.insert(pool.idle.end(), leased.begin(), leased.end());
}

}  // namespace pool
