cat > /usr/local/bin/count << 'END'
#!/bin/bash
find "$1" -type f | wc -l
END
chmod +x /usr/local/bin/count
